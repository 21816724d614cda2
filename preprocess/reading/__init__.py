"""Reading a scan rightly, a kind of file a module. ``preprocess.scan`` is the door; nothing else imports from here."""
