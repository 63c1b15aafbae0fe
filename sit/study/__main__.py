"""``python -m sit.study STUDY.yaml``: mixers × seeds trained, evaluated and compared."""

from sit.study.cli import main

if __name__ == "__main__":
    main()
