"""comfyd: the daemon that turns ComfyUI into a production API."""

__version__ = "0.1.0"
