"""Record what timm computes; it needs PyTorch and timm, which the package's tests do not.

From the root of a checkout: python -m tests.parity.golden_lite.record
"""

from pathlib import Path

import numpy as np
import timm
import torch

from tests.parity import golden_weights

SIZE = 32, 64

if __name__ == "__main__":
    for seed in (0, 1, 2):
        name = f"tf_efficientnet_lite{seed}"
        network = timm.create_model(name).eval()
        shapes = {f"backbone.{key}": tuple(x.shape) for key, x in network.state_dict().items()}
        drawn = golden_weights.make(shapes, seed)
        network.load_state_dict(
            {key.removeprefix("backbone."): torch.from_numpy(x) for key, x in drawn.items()}
        )
        image = golden_weights.image(*SIZE, seed).astype(np.float32)
        x = torch.from_numpy((image - 127) / 128).permute(2, 0, 1)[None]
        features = {}
        with torch.no_grad():
            x = network.bn1(network.conv_stem(x))
            features["conv_stem"] = x
            for stage, blocks in enumerate(network.blocks):
                x = features[f"blocks{stage}"] = blocks(x)
        arrays = {key: x[0].permute(1, 2, 0).numpy() for key, x in features.items()}
        np.savez_compressed(Path(__file__).with_name(f"{name}.npz"), **arrays)
