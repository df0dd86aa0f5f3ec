"""Who it is: one file per source family that recognises it, measures it and describes it."""
