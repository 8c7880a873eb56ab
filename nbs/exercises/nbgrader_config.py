"""nbgrader's settings for this course. In this folder: `nbgrader generate_assignment 03_scores`,
`nbgrader autograde 03_scores` and so on.

The sources are here. Releases, submissions and the gradebook go to runs/course/, which git ignores:
what is below nbs/ is the course itself."""
import os, sys
from pathlib import Path

here = Path(__file__).resolve().parent
course = here.parents[1]/'runs'/'course'
course.mkdir(parents=True, exist_ok=True)
# nbgrader starts alembic by its name, also where no environment is activated
programs = str(Path(sys.executable).parent)
os.environ['PATH'] = os.pathsep.join([programs, os.environ.get('PATH', os.defpath)])

c = get_config()

c.CourseDirectory.course_id = 'risclip'
c.CourseDirectory.root = str(course)
c.CourseDirectory.source_directory = str(here/'source')
c.CourseDirectory.db_url = f'sqlite:///{course}/gradebook.db'
c.ExecutePreprocessor.timeout = 300     # seconds a cell
