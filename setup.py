"""Everything is read from settings.ini. A wheel also carries the small models of data/ as
risclip/<name>."""
import configparser, shutil
from pathlib import Path
from setuptools import setup
from setuptools.command.build_py import build_py

here = Path(__file__).resolve().parent
parser = configparser.ConfigParser(delimiters=['='])
parser.read(here/'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
readme = here/'README.md'
package = cfg['lib_path']
shipped = 'tinyclip', 'risclip-refmojig'   # folders of data/


class build_with_models(build_py):
    "Copies the shipped models into the package; an editable install finds them in data/ itself."
    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False): return
        for name in shipped:
            source, target = here/'data'/name, Path(self.build_lib)/'risclip'/name
            if source.is_dir(): shutil.copytree(source, target, dirs_exist_ok=True)


setup(
    name=cfg['lib_name'], version=cfg['version'],
    description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'],
    license='Apache-2.0', license_files=['LICENSE'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else '',
    long_description_content_type='text/markdown',
    packages=[package], cmdclass=dict(build_py=build_with_models),
    python_requires='>='+cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require={name: cfg[f'{name}_requirements'].split() for name in ('dev', 'site')},
    entry_points=dict(console_scripts=cfg['console_scripts'].split(),
                      nbdev=[f'{package}={package}._modidx:d']),
    zip_safe=False)
