"""One file per paper: config functions, each a row of the paper, and a main. See README.md here for the index."""
