"""Settings of every objective for tests on tiny images and nets."""

SMALL = {
    "supervised": {},
    "moco_v2": {"queue_size": 32, "momentum": 0.9, "hidden_dim": 24, "projection_dim": 12},
    "simclr": {"hidden_dim": 24, "projection_dim": 12},
    "dino": {
        "second_augment": ("color_jitter",),
        "local_augment": ("color_jitter", "flip"),
        "num_local": 1,
        "output_dim": 20,
        "hidden_dim": 24,
        "bottleneck_dim": 12,
        "momentum": 0.9,
    },
    "clip": {
        "vocabulary_size": 300,
        "context_length": 6,
        "embedding_dim": 8,
        "text_width": 8,
        "text_layers": 1,
        "text_heads": 2,
    },
    "rotation": {},
    "relative_patch": {"embedding": 12, "hidden": 20},
    "jigsaw": {"embedding": 12, "hidden": 20, "permutations": 6, "permutations_per_step": 3},
    "exemplar": {"embedding": 12, "copies": 3},
    "sup_exemplar": {"embedding": 12, "copies": 3, "weight": 0.7},
    "semi_rotation": {"weight": 0.7},
    "semi_exemplar": {"embedding": 12, "copies": 3, "weight": 0.7},
    **{name: {"latent_dim": 6, "decoder_width": 4} for name in ("vae", "wae_mmd", "wae_ukl", "wae_gan")},
    "mae": {"decoder_layers": 1, "decoder_width": 24, "decoder_heads": 2},
}
