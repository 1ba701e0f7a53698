"""Reports: one file per medium. They read a diagnosis and change nothing."""
