"""`python -m vlmq_export` is the command `vlmq-export`."""

from vlmq_export.cli import main

if __name__ == "__main__":
    main()
