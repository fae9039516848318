"""Entry point of the ComfyUI node pack; everything else is imported when ComfyUI asks for it."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes.extension import DMD2Extension

    return DMD2Extension()
