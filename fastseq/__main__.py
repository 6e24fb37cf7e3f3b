"""`python -m fastseq`."""

from fastseq.cli import main

if __name__ == "__main__":
    main()
