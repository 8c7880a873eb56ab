"""nbgrader's settings for this course: in this folder, `nbgrader generate_assignment 03_scoring`, `nbgrader autograde 03_scoring` and so on.

The sources lie here. Releases, submissions and the gradebook go to runs/course/, which git ignores: what lies below nbs/ is the course itself."""
import os, sys
from pathlib import Path

here = Path(__file__).resolve().parent
course = here.parents[1]/'runs'/'course'
course.mkdir(parents=True, exist_ok=True)
os.environ['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', os.defpath)])    # nbgrader starts alembic by its name, also where no environment is activated

c = get_config()

c.CourseDirectory.course_id = 'risclip'
c.CourseDirectory.root = str(course)
c.CourseDirectory.source_directory = str(here/'source')
c.CourseDirectory.db_url = f'sqlite:///{course}/gradebook.db'
c.ExecutePreprocessor.timeout = 300     # seconds a cell
