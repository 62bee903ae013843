"""Bad input, made by code: image files, folder entries, manifests and configurations, each with what must come of it."""
