"""Plain classes that become Serve replicas and Ray actors; decorated only in app.main."""
