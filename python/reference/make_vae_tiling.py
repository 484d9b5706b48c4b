"""Records diffusers' tiled VAE encode and decode.

  python make_vae_tiling.py MODEL_DIR OUT.safetensors

pixels [1, 3, 1, H, W] -> moments_mean (mode of the posterior); latents [1, 16, 1, h, w] -> decoded, clamped to -1..1,
every second pixel of it. Tiling as enable_tiling() sets it (256 px tiles, 192 px steps). Needs: torch diffusers.
"""
import sys, torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import save_file

torch.set_grad_enabled(False)
vae = AutoencoderKLQwenImage.from_pretrained(sys.argv[1], subfolder="vae", torch_dtype=torch.float32)
vae.enable_tiling()
g = torch.Generator().manual_seed(4)
h, w = 320, 472
y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
pixels = torch.stack([torch.sin(x / 30 + y / 50), torch.cos(x * y / 4000), (x + y) % 64 / 32 - 1]).float()[None, :, None]
pixels = torch.round((pixels * 0.5 + 0.5) * 255) / 255 * 2 - 1
latents = torch.randn(1, 16, 1, 40, 59, generator=g)
out = vae.encode(pixels).latent_dist.mode()
dec = vae.decode(latents).sample.clamp(-1, 1)
save_file({"pixels": (torch.round((pixels * 0.5 + 0.5) * 255)).to(torch.uint8).contiguous(), "mean": out.contiguous(), "latents": latents,
           "decoded_half": dec[..., ::2, ::2].contiguous()}, sys.argv[2])
