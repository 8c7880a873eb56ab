"""Make a trained model that ships out of a finished run: python tools/ship.py runs/refmojig_long risclip-refmojig

Writes data/<name>/: the trained parts in half precision, the metrics of exactly these weights, the run's losses and settings, and a card."""
import json, shutil, sys
from pathlib import Path

from risclip.model import load_risclip
from risclip.refmoji import VERSION
from risclip.training import Settings, measure, read_history, refer_of, table

DATA = Path(__file__).resolve().parents[1]/'data'


def card(name, config, metrics, history) -> str:
    s, v = config['settings'], config['versions']
    recipe = '\n'.join(f'| {key} | {value} |' for key, value in s.items() if key not in ('root', 'workers'))
    kinds = '\n'.join(f'| {kind} | {row["n"]} | {metrics["kinds"]["grounding"][kind]["miou"]:.1f} | {row["miou"]:.1f} |' for kind, row in metrics['kinds']['mask'].items())
    ends = {stage: [r['loss'] for r in history if r['stage'] == stage] for stage in (1, 2)}
    losses = '; '.join(f'stage {stage}: loss {sum(x[:20])/20:.2f} over the first 20 of {len(x)} steps, {sum(x[-20:])/20:.2f} over the last 20' for stage, x in ends.items())
    return f"""# {name}

RISCLIP's trained parts (adapters, CFE, SKE, decoder) over the frozen `{s['clip']}`, for the `{s['data']}` set of RefMoji. It knows drawings of
that world and its words, and nothing of photographs. Load it with `risclip.model.load_risclip('{name}')`; chapter 12 tells how it was trained.

Scored on all {metrics['expressions']} expressions of `{s['data']}` {s['test']}, at each picture's own size, in percent:

```
{table(metrics)}
```

| kind of expression | how many | mIoU of the stage-1 map | mIoU of the mask |
|---|---|---|---|
{kinds}

{losses[0].upper() + losses[1:]}. `history.csv` has every step. Made with risclip {v['risclip']}, torch {v['torch']}, Python {v['python']}.

The weights are in half precision, and the numbers above are theirs. They are under Apache-2.0, as the code; the pictures they were trained on
are made from OpenMoji's drawings (https://openmoji.org, CC BY-SA 4.0).

| setting | value |
|---|---|
{recipe}
"""


def ship(run: Path, name: str):
    run, folder = Path(run), DATA/name
    config = json.loads((run/'config.json').read_text())
    if config['versions']['refmoji'] != VERSION: sys.exit(f"{run} was trained on RefMoji as {config['versions']['refmoji']}, and it is {VERSION} now: train it again")
    config['settings']['root'] = None                     # where the data lay is nobody's business
    load_risclip(run).save(folder, half=True)
    s = Settings(**config['settings'])
    metrics = measure(load_risclip(folder), s, refer_of(s))
    (folder/'metrics.json').write_text(json.dumps(metrics, indent=1) + '\n')
    (folder/'run.json').write_text(json.dumps(config, indent=1) + '\n')
    shutil.copy(run/'history.csv', folder/'history.csv')
    (folder/'README.md').write_text(card(name, config, metrics, read_history(run/'history.csv')), encoding='utf-8')
    print(table(metrics)); print(f'written to {folder}')


if __name__ == '__main__': ship(*sys.argv[1:])
