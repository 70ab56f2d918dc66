"""``python -m seqbatch`` is the ``seqbatch`` command."""

from seqbatch.cli import main

if __name__ == "__main__":
    main()
