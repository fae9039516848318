"""ComfyUI nodes over dmd2_core. All imports within the pack are relative: inside ComfyUI, the only
place where it runs, `nodes` is a module of ComfyUI's own."""
