"""Real runs that take seconds, and what their notebooks show"""
from pathlib import Path

import nbformat

from caption_nb.runs import new_run, note_fingerprints
from caption_nb.training import Trainer, demo_config


def tiny_run(folder: Path, # Where runs/ and cache/ are made
             seed: int = 0, size: int = 16, # Of the embedding
             ) -> Path: # Run folder
    "A run on 40 scenes, trained for two epochs, with results on dev"
    config = demo_config(num_images=40, epochs=2, eval_every=1, seed=seed, embed_dim=size, hidden_dim=16, attention_dim=16, beam=2,
                         name=f'tiny{size}', cache_dir=str(folder/'cache'))
    trainer = Trainer(config, run := new_run(config, folder/'runs'), quiet=True).prepare()
    note_fingerprints(run, trainer)
    trainer.fit()
    trainer.evaluate('dev')
    return run


def texts(record: Path) -> str:
    "All that the cells of an executed notebook show"
    cells = nbformat.read(record, 4).cells
    return '\n'.join(str(o.get('text', '') or o.get('data', {}).get('text/markdown', '')) for c in cells for o in c.get('outputs', []))
