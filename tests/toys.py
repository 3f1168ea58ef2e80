"Small things that behave like the real ones: shaken networks, weights in memory and on disk."
from dataclasses import asdict

import torch

from fluogen.models.unet import Backbone
from fluogen.models.controlnet import ControlBranch
from fluogen.diffusion.direct import DirectConfig
from fluogen.models.text_encoder import WordEncoder
from fluogen.diffusion.schedule import Schedule, ScheduleConfig
from fluogen.models.unet import BackboneConfig
from fluogen.models.cards import CARD_KEYS
from fluogen.models.zoo import Weights, save_weights

PROMPTS = ("F-actin of COS-7", "ER of COS-7", "Microtubules of HeLa")
TINY = BackboneConfig.tiny(attention_levels=(), stem="unshuffle2")  # sizes: multiples of 2 camera pixels
CARD = dict.fromkeys(CARD_KEYS, "a test")
ABOUT = {"task": "sr", "scale": 2, "norm": "percentile:0.1,99.9", "schedule": asdict(ScheduleConfig())}


def shake(net, seed=0, size=0.5):
    "All weights random: zeros would hide mistakes."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (size / max(p[0].numel(), 4) ** 0.5))
    return net.eval()


class NoNoise(torch.nn.Module):
    "A backbone that sees no noise: the direct adaptation then hands the bicubic image through."
    def __init__(self, config=TINY):
        super().__init__()
        self.config, self.schedule, self.nothing = config, Schedule(), torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, states=None, **cached):
        return -self.schedule.noise(t) / self.schedule.signal(t) * x


def make_weights(kind="direct", seed=0, config=TINY) -> Weights:
    "direct, control or bicubic, in memory."
    words = shake(WordEncoder(PROMPTS, config.prompt_width), seed, 4)
    modules = {"backbone": NoNoise(config) if kind == "bicubic" else shake(Backbone(config), seed),
               "prompts": words}
    if kind == "control":
        modules["control"] = shake(ControlBranch.from_backbone(modules["backbone"]), seed + 1)
    about = ABOUT | {"name": kind, "adaptation": kind, "sha256": f"{seed:064x}"}
    return Weights(kind, about, modules, Schedule(), None if kind == "control" else DirectConfig())


def save_toy(folder, kind="direct", seed=0, **options):
    "The same on disk; gives the folder."
    weights = make_weights(kind, seed)
    states = {name: module.state_dict() for name, module in weights.modules.items()}
    configs = {name: module.config if isinstance(module.config, dict) else module.config.to_dict()
               for name, module in weights.modules.items()}
    direct = asdict(weights.direct) if weights.direct else None
    about = ABOUT | {"adaptation": kind, "modules": configs, "direct": direct}
    return save_weights(folder, states, about, CARD, **options)


def save_interval_toy(folder, seed=0):
    "A toy that hands a dimmed bicubic image through, and heads beside it whose intervals are poor but can be certified."
    from fluogen.models.quantile_heads import HeadsConfig, QuantileHeads
    weights = make_weights(seed=seed)
    torch.nn.init.zeros_(weights.backbone.head.weight)
    torch.nn.init.zeros_(weights.backbone.head.bias)
    configs = {name: module.config if isinstance(module.config, dict) else module.config.to_dict() for name, module in weights.modules.items()}
    about = ABOUT | {"adaptation": "direct", "modules": configs, "direct": asdict(weights.direct)}
    made = save_weights(folder, {name: module.state_dict() for name, module in weights.modules.items()}, about, CARD)
    heads = QuantileHeads(HeadsConfig.from_backbone(TINY))
    save_weights(made.parent / f"{made.name}-heads", {"heads": heads.state_dict()}, {"task": "interval", "modules": {"heads": heads.config.to_dict()}},
                 CARD, base=str(made))
    return made
