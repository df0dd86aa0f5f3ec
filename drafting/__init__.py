"""Draft it: from a checkpoint's names and shapes to the package of a family of one's own, with every doubt marked."""
