"""Make a trained model that ships out of a finished run: python tools/ship.py runs/refmojig_long risclip-refmojig

Writes data/<name>/: the trained parts in half precision, the metrics of exactly these weights, the run's losses and settings, and a card."""
import json, shutil, sys
from pathlib import Path

from risclip.model import load_risclip
from risclip.refmoji import VERSION
from risclip.sharing import model_card, run_facts
from risclip.training import Settings, measure, refer_of, table

DATA = Path(__file__).resolve().parents[1]/'data'


def ship(run: Path, name: str):
    run, folder = Path(run), DATA/name
    config = json.loads((run/'config.json').read_text())
    if config['versions']['refmoji'] != VERSION: sys.exit(f"{run} was trained on RefMoji as {config['versions']['refmoji']}, and it is {VERSION} now: train it again")
    config['settings']['root'] = None                     # where the data lay is nobody's business
    load_risclip(run).save(folder, half=True)
    (folder/'run.json').write_text(json.dumps(config, indent=1) + '\n')
    shutil.copy(run/'history.csv', folder/'history.csv')
    s, model = Settings(**config['settings']), load_risclip(folder)
    metrics = measure(model, s, refer_of(s))
    (folder/'metrics.json').write_text(json.dumps(metrics, indent=1) + '\n')
    (folder/'README.md').write_text(str(model_card(model, name, run_facts(folder), half=True)), encoding='utf-8')
    print(table(metrics)); print(f'written to {folder}')


if __name__ == '__main__': ship(*sys.argv[1:])
