"""Did it learn? What moved between two files of weights, features before and after."""
