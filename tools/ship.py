"""Make a trained model that ships out of a finished run:

    python tools/ship.py runs/refmojig_long risclip-refmojig

Writes data/<name>/ with `save_pretrained`: the trained parts in half precision and a card; beside
them the metrics of exactly these weights, the run's settings and its losses."""
import json
import shutil
import sys
from pathlib import Path

from risclip.evaluation import evaluate_model, refer_of, table
from risclip.files import write_json
from risclip.model import RISCLIP
from risclip.settings import Settings
from risclip.sharing import card_facts

DATA = Path(__file__).resolve().parents[1]/'data'


def ship(run: Path, folder: Path):
    "A run's folder, and where the model goes; its name is what it will be called."
    config = json.loads((run/'config.json').read_text())
    config['settings']['root'] = None                     # where the data was is nobody's business
    s = Settings(**config['settings'])
    refer = refer_of(s)
    trained_on, now = config['data_version'], refer.info.get('version')
    if trained_on != now:
        sys.exit(f'{run} was trained on {s.data} as {trained_on}, and it is {now} now: '
                 'train it again')
    RISCLIP.from_pretrained(run).save_pretrained(folder, half=True)
    model = RISCLIP.from_pretrained(folder)               # rounded: another model than the run's
    metrics = evaluate_model(model, refer, s.test, limit=s.test_limit, workers=s.workers,
                             batch_size=s.eval_batch_size)
    write_json(folder/'metrics.json', metrics)
    write_json(folder/'run.json', config)
    card = dict(name=folder.name, half=True) | card_facts(folder)
    model.save_pretrained(folder, model_card_kwargs=card)
    shutil.copy(run/'history.csv', folder/'history.csv')
    print(table(metrics))
    print(f'written to {folder}')


if __name__ == '__main__': ship(Path(sys.argv[1]), DATA/sys.argv[2])
