"""Raw scans -> patch store, in five steps. No torch model of ours is used here."""
