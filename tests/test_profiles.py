"""Profiles and batch scripts: what they refuse, and that no value meets a shell. Real bash everywhere, a real SLURM at the end."""
import dataclasses
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from caption_nb import profiles as module
from caption_nb.profiles import (SBATCH_OPTIONS, TASK, Profile, ProfileError, TaskIndex, batch_script, check_script, load_profile, profiles,
                                 sbatch_quote, shell_quote, slurm_folder, time_seconds)

NASTY = ['a b', "it's", 'say "x"', 'a;touch bad', '$(touch bad)', '`touch bad`', '$HOME', 'back\\slash', 'a\\', '100%', '%j%%x', 'a#b', ' # c', ' lead', 'trail ',
         '-n', '--wrap=x', '~', '*', '?', '[a]', '{a,b}', '!x', 'a&b', 'a|b', '(x)', '<x>', "'", '"', "$'x'", '{{setup}}', 'Zürich', '日本語', '🎈', 'a\u00a0b',
         '#SBATCH --mem=1', 'é', 'x=y']
BROKEN = ['two\nlines', 'a\n#SBATCH --account=you', 'tab\there', 'cr\r', 'bell\x07', '\x1b[31m', '\u2028', '\x7f']
plain = st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=('Cc', 'Cs', 'Zl', 'Zp')), min_size=1, max_size=30))
anything = st.one_of(st.sampled_from(NASTY + BROKEN), st.text(st.characters(exclude_categories=('Cs',), exclude_characters='\0'), max_size=30))


def folder_name(text: str) -> str: # A name that a file system takes
    return text.replace('/', '_').strip('.').encode()[:80].decode('utf-8', 'ignore') or 'x'


def program(folder: Path, name: str, body: str) -> Path:
    "An executable"
    path = folder/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(body)
    path.chmod(0o755)
    return path


def render(tmp: Path, command=('run',), close=('close',), profile=None, **changes) -> Path:
    "A batch script in `tmp` whose interpreter is the program `python` there"
    profile = profile or Profile(name='mine', python=str(tmp/'python'))
    text = batch_script(profile, **{**dict(job_name='job', command=command, close=close, log=tmp/'log-%j', python_path=tmp/'code', chdir=tmp), **changes})
    assert check_script(text) == []
    return program(tmp, 'job.sh', text)


def environment(tmp: Path, **more) -> dict:
    "Programs of `tmp` first; no SLURM around"
    keep = {k: v for k, v in os.environ.items() if not k.startswith('SLURM_')}
    return {**keep, 'PATH': f'{tmp}:{os.environ["PATH"]}', 'SLURM_JOB_ID': '7', **more}


def bash(tmp: Path, **more) -> subprocess.CompletedProcess:
    return subprocess.run(['bash', tmp/'job.sh'], cwd='/', env=environment(tmp, **more), capture_output=True, text=True, timeout=60)


# ---- quoting ----------------------------------------------------------------------------------------------------

DUMP = f'''#!{sys.executable} -IS
import json, os, sys
with open(os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), 'said'), 'a') as f:
    f.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], dict(os.environ), os.getcwd()]) + '\\n')
'''


@settings(max_examples=80, deadline=None)
@given(words=st.lists(anything, min_size=1, max_size=4), work=anything, code=anything, env=plain, proxy=plain, modules=st.lists(plain, max_size=2),
       name=plain, interpreter=plain, header=anything)
@example(words=['a\nb', ''], work='x\ny $(touch bad)', code="c'd", env='$(touch bad)', proxy="'\"", modules=['a b;touch bad'], name='n', interpreter='py thon',
         header='x\n#SBATCH --mem=1\n$(touch bad)')
def test_no_value_meets_a_shell(tmp_path_factory, words, work, code, env, proxy, modules, name, interpreter, header):
    tmp = tmp_path_factory.mktemp('job')
    for stub in ('module', folder_name(interpreter)): program(tmp, stub, DUMP)
    (chdir := tmp/'work'/folder_name(work)).mkdir(parents=True)
    active = program(tmp/'env'/folder_name(env), 'activate', 'ACTIVATED=yes; export ACTIVATED; echo "$unset" > /dev/null\n')
    python_path = tmp/'code'/folder_name(code).replace(':', '_')
    modules = [m for m in modules if m.strip() and not m.startswith('-')]
    proxy = proxy.lstrip('/')
    profile = Profile.from_dict(dict(name='mine', python=str(tmp/folder_name(interpreter)), modules=modules, activate=str(active),
                                     env={'VALUE': env}, proxy='http://x' + proxy))
    render(tmp, profile=profile, command=[*words, TASK], job_name=name, python_path=python_path, chdir=chdir, header=header)
    done = bash(tmp, PYTHONPATH='/before', no_proxy='here')
    assert done.returncode == 0 and not done.stderr, done.stderr
    said = [json.loads(line) for line in (tmp/'said').read_text().splitlines()]
    assert [arguments for program, arguments, *_ in said if program == 'module'] == [['load', m] for m in modules]
    _, arguments, found, cwd = said[-1]
    assert arguments == [*words, '0'] and cwd == str(chdir)
    assert found['VALUE'] == env and found['ACTIVATED'] == 'yes'
    assert all(found[k] == 'http://x' + proxy for k in ('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'))
    assert found['no_proxy'] == found['NO_PROXY'] == 'localhost,127.0.0.1,::1,here'
    assert found['PYTHONPATH'] == f'{python_path}:/before' and found['OMP_NUM_THREADS'] == '2'
    assert not list(tmp.rglob('bad')) and not Path('/bad').exists()


@settings(max_examples=300, deadline=None)
@given(anything)
def test_shell_quote_is_one_word_on_one_line(value):
    quoted = shell_quote(value)
    assert '\n' not in quoted and '\r' not in quoted


def test_bytes_that_are_no_text(tmp_path):
    value = os.fsdecode(b'caf\xe9 \xff')
    done = subprocess.run(['bash', '-c', f'printf %s {shell_quote(value)}'], capture_output=True)
    assert done.stdout == b'caf\xe9 \xff'
    with pytest.raises(ProfileError, match='no UTF-8'): sbatch_quote(value)
    with pytest.raises(ProfileError, match='zero byte'): shell_quote('a\0b')


@given(plain)
def test_sbatch_quote_is_read_back(value):
    assert module._words(f'--comment={sbatch_quote(value)} --mem=1') == [f'--comment={value}', '--mem=1']


@pytest.mark.parametrize('value', BROKEN)
def test_profiles_cannot_inject_lines(value):
    for field in ('name', 'about', 'partition', 'account', 'gres', 'conda', 'activate', 'python', 'work', 'scratch'):
        with pytest.raises(ProfileError, match='control character'): Profile.from_dict({field: value})
    for field, content in dict(sbatch=['--comment=' + value], modules=[value], env={'A': value}).items():
        with pytest.raises(ProfileError, match='control character'): Profile.from_dict({field: content})
    with pytest.raises(ProfileError, match='control character'): render(Path('/tmp'), job_name=value)
    with pytest.raises(ProfileError, match='control character'): render(Path('/tmp'), log=Path('/tmp')/value/'log')


def test_what_cannot_be_said_is_refused(tmp_path):
    with pytest.raises(ProfileError, match='backslash'): render(tmp_path, log=tmp_path/'a\\b'/'log-%j')
    with pytest.raises(ProfileError, match='colon'): render(tmp_path, python_path=tmp_path/'a:b')
    with pytest.raises(ProfileError, match='array'): render(tmp_path, array='0-3; rm')
    with pytest.raises(ProfileError, match='nothing to submit'): render(tmp_path, profile=Profile(name='local', slurm=False))
    assert '\n#: SBATCH --mem=1\n' in render(tmp_path, header='SBATCH --mem=1').read_text()   # a comment that looks like an option


# ---- the shell around the program -------------------------------------------------------------------------------

SCONTROL = '''#!/bin/bash
here=$(dirname "$0")
echo "$*" >> "$here/requeued"
kill -TERM $PPID                      # as SLURM does
n=$(wc -l < "$here/requeued")
[ "$n" -gt "${BUSY:-0}" ] && exit 0
echo "${ANSWER:-Unable to contact slurm controller}" >&2; exit 1
'''


def shell(tmp: Path, python: str, scontrol: str = SCONTROL, **options) -> Path:
    "A script whose interpreter is the shell program `python`; `sleep` of the retries takes no time"
    program(tmp, 'python', '#!/bin/bash\nhere=$(dirname "$0"); echo "$*" >> "$here/said"\n' + python)
    program(tmp, 'scontrol', scontrol)
    return render(tmp, **options)


def lines(path: Path) -> list[str]: return path.read_text().splitlines() if path.exists() else []


def until(condition, seconds=20.):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)


@pytest.mark.parametrize('code', [0, 1, 2, 3, 143])
def test_an_exit_code_comes_through(tmp_path, code):
    shell(tmp_path, f'exit {code}')
    assert bash(tmp_path).returncode == code
    assert lines(tmp_path/'said') == ['run'] and not lines(tmp_path/'requeued')


def test_85_requeues_once(tmp_path):
    shell(tmp_path, 'exit 85')
    done = bash(tmp_path)
    assert done.returncode == 85 and lines(tmp_path/'requeued') == ['requeue 7'] and not done.stderr


def test_a_task_requeues_itself_alone(tmp_path):
    "The last task of an array has the job id of the array: by that id all tasks would run again"
    shell(tmp_path, 'exit 85', command=['run', TaskIndex(3)])
    assert bash(tmp_path, SLURM_ARRAY_JOB_ID='7', SLURM_ARRAY_TASK_ID='2').returncode == 85
    assert lines(tmp_path/'requeued') == ['requeue 7_2'] and lines(tmp_path/'said') == ['run 2']
    bash(tmp_path)
    assert lines(tmp_path/'said')[1] == 'run 3'


def test_a_busy_controller_is_asked_again(tmp_path):
    shell(tmp_path, 'exit 85')
    program(tmp_path, 'sleep', '#!/bin/sh\n')
    done = bash(tmp_path, BUSY='2')
    assert done.returncode == 85 and len(lines(tmp_path/'requeued')) == 3
    assert done.stderr.count('cannot requeue: Unable to contact slurm controller') == 2
    done = bash(tmp_path, BUSY='99')
    assert done.returncode == 85 and len(lines(tmp_path/'requeued')) == 3 + 5


def test_slurm_may_be_faster(tmp_path):
    shell(tmp_path, 'exit 85')
    done = bash(tmp_path, BUSY='9', ANSWER='Job is pending execution for job 7')
    assert done.returncode == 85 and len(lines(tmp_path/'requeued')) == 1 and not done.stderr


@pytest.mark.parametrize('answer, code, requeued', [(85, 85, 1), (137, 137, 0), (1, 137, 0), (0, 0, 0)])
def test_a_killed_program_has_its_record_closed(tmp_path, answer, code, requeued):
    "A closing program that fails itself (1) leaves the code as it was"
    shell(tmp_path, f'[ "$1" = close ] && exit {answer}; kill -9 $$', close=['close', TASK])
    assert bash(tmp_path).returncode == code
    assert lines(tmp_path/'said') == ['run', 'close 0 137'] and len(lines(tmp_path/'requeued')) == requeued


HEARS = '''[ "$1" = run ] || exit 1
trap 'echo USR2 >> "$here/heard"' USR2; trap 'echo TERM >> "$here/heard"; exit 143' TERM
touch "$here/ready"; n=0
while [ $(cat "$here/heard" 2>/dev/null | wc -l) -lt {times} ]; do /bin/sleep 0.02; done
/bin/sleep 0.3; exit {code}
'''


def start(tmp: Path, **more) -> subprocess.Popen:
    return subprocess.Popen(['bash', tmp/'job.sh'], cwd='/', env=environment(tmp, **more), stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize('times', [1, 3])
def test_a_warning_is_passed_on_and_the_code_not_lost(tmp_path, times):
    shell(tmp_path, HEARS.format(times=times, code=85))
    job = start(tmp_path)
    until((tmp_path/'ready').exists)
    for n in range(times):
        job.send_signal(signal.SIGUSR2)
        until(lambda: len(lines(tmp_path/'heard')) == n + 1)
    assert job.wait(20) == 85 and lines(tmp_path/'heard') == ['USR2']*times and lines(tmp_path/'requeued') == ['requeue 7']


def test_term_is_passed_on(tmp_path):
    shell(tmp_path, HEARS.format(times=9, code=1))
    job = start(tmp_path)
    until((tmp_path/'ready').exists)
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 143 and lines(tmp_path/'heard') == ['TERM'] and lines(tmp_path/'said') == ['run']


@pytest.mark.parametrize('name, requeue, code', [('SIGUSR2', True, 85), ('SIGUSR2', False, 143), ('SIGTERM', True, 143)])
def test_a_signal_before_the_program(tmp_path, name, requeue, code):
    "It comes while a module is being loaded: the program need not begin"
    program(tmp_path, 'module', '#!/bin/sh\ntouch "$(dirname "$0")/loading"; /bin/sleep 0.5\n')
    shell(tmp_path, 'exit 0', profile=Profile(name='mine', python=str(tmp_path/'python'), modules=('cuda',), requeue=requeue))
    job = start(tmp_path)
    until((tmp_path/'loading').exists)
    job.send_signal(getattr(signal, name))
    assert job.wait(20) == code and not lines(tmp_path/'said')
    assert len(lines(tmp_path/'requeued')) == (code == 85)


def test_no_signal_makes_the_code_another(tmp_path):
    "Signals by the hundred, also in the moment in which the program ends"
    for trial in range(8):
        tmp = tmp_path/str(trial)
        program(tmp, 'python', f'#!{sys.executable} -IS\nimport os, signal, time\n'
                               f'for s in (12, 15): signal.signal(s, lambda *_: None)\nopen({str(tmp/"ready")!r}, "w")\ntime.sleep(0.2)\nos._exit(7)\n')
        render(tmp)
        job = start(tmp)
        until((tmp/'ready').exists)
        while job.poll() is None:
            job.send_signal(random.choice([signal.SIGUSR2, signal.SIGTERM]))
            time.sleep(0.001)
        assert job.returncode == 7, job.stderr.read()


@pytest.mark.parametrize('values, message', [
    (dict(modules=('cuda', 'nowhere')), 'profile mine: modules = "nowhere" failed'),
    (dict(activate='/nowhere/bin/activate'), 'profile mine: activate = "/nowhere/bin/activate" failed'),
    (dict(conda='nowhere'), 'profile mine: conda = "nowhere" failed')])
def test_a_set_up_that_fails_is_named(tmp_path, values, message):
    program(tmp_path, 'module', '#!/bin/sh\n[ "$2" = cuda ]\n')
    program(tmp_path, 'conda', f'#!/bin/sh\necho {tmp_path}\n')
    program(tmp_path, 'etc/profile.d/conda.sh', 'conda() { [ "$2" = there ]; }\n')
    shell(tmp_path, 'exit 0', profile=Profile(name='mine', python=str(tmp_path/'python'), **values))
    done = bash(tmp_path)
    assert done.returncode == 1 and message in done.stderr and not lines(tmp_path/'said')


def test_conda_and_a_folder_that_is_not_there(tmp_path):
    program(tmp_path, 'conda', f'#!/bin/sh\necho {tmp_path}\n')
    program(tmp_path, 'etc/profile.d/conda.sh', 'conda() { [ "$2" = "there is" ]; }\n')
    shell(tmp_path, 'exit 0', profile=Profile(name='mine', conda='there is'))
    assert bash(tmp_path).returncode == 0 and lines(tmp_path/'said') == ['run']
    program(tmp_path, 'conda', '#!/bin/sh\nexit 1\n')
    assert 'there is no conda' in bash(tmp_path).stderr
    render(tmp_path, chdir=tmp_path/'gone')
    done = bash(tmp_path)
    assert done.returncode == 1 and 'gone cannot be entered: do the nodes see it?' in done.stderr


def test_module_is_looked_for(tmp_path):
    "A batch shell need not know `module`: the site's file defines it"
    program(tmp_path, 'init/bash', f'module() {{ echo "$*" >> {tmp_path}/loaded; }}\n')
    shell(tmp_path, 'exit 0', profile=Profile(name='mine', python=str(tmp_path/'python'), modules=('cuda/12',)))
    assert bash(tmp_path, MODULESHOME=str(tmp_path)).returncode == 0 and lines(tmp_path/'loaded') == ['load cuda/12']


def test_the_snapshot_goes_before_the_current_folder(tmp_path):
    for folder in ('code', 'clone'): program(tmp_path, f'{folder}/which_one.py', f'print({folder!r})\n')
    render(tmp_path, profile=Profile(name='mine', python=sys.executable), command=['-m', 'which_one'], chdir=tmp_path/'clone')
    if sys.version_info >= (3, 11): assert bash(tmp_path).stdout == 'code\n'


# ---- scripts with the eyes of sbatch ----------------------------------------------------------------------------

@pytest.mark.parametrize('line, fault', [
    ('#SBATCH --gpus-per-nodes=1', "did you mean 'gpus-per-node'"),
    ('#SBATCH --jobname=x', "did you mean 'job-name'"),
    ('#SBATCH --gres = gpu:1', 'lacks its value'),
    ('#SBATCH --gres= gpu:1', 'lacks its value'),
    ('#SBATCH --gres =gpu:1', "would take '=gpu:1'"),
    ('#SBATCH -J=x', "means the value '=x'"),
    ('#SBATCH -Z', 'no option -Z'),
    ('#SBATCH -job-name=x', 'no option -j'),
    ('#SBATCH job-name=x', 'belongs to no option'),
    ('#SBATCH --output=/a b', "'b' belongs to no option"),
    ('#SBATCH --output=/a#b', 'cut off'),
    ('#SBATCH --job-name="x', 'not closed'),
    ('#SBATCH --exclude --job-name=y', "would take '--job-name=y'"),
    ('#SBATCH --requeue=no', 'takes no value'),
    ('#SBATCH --wrap=hostname', 'knows no option --wrap'),
    ('#SBATCH --mem=1G --mem=2G', 'SLURM would take the last'),
    ('#SBTACH --ntasks-per-node=16', 'SLURM ignores'),
    ('# SBATCH --mem=1G', 'SLURM ignores'),
    ('##SBATCH --mem=1G', 'SLURM ignores'),
    (' #SBATCH --mem=1G', 'SLURM ignores'),
    ('#sbatch --mem=1G', 'SLURM ignores'),
    ('#SBACTH -J x', 'SLURM ignores')])
def test_typos_are_found(line, fault):
    found = check_script(f'#!/bin/bash\n{line}\necho\n')
    assert len(found) == 1 and found[0].startswith('line 2: ') and fault in found[0]
    if line.startswith('#SBATCH'): assert 'line 3' in check_script(f'#!/bin/bash\necho\n#SBATCH --mem=1G\n')[0]


def test_what_is_right_is_not_blamed():
    assert check_script('#!/bin/bash\n#SBATCH --mem=4G -J "my job" -N2  # why\n\n   # indented\n#SBATCH -HOt5\n#SBATCH\n#SBATCH --exclusive --nice=-5\n'
                        "# Scratch - a folder\n# batch -- of things\n#SBATCH --comment='a \\' # b'\nset -u\n# after\n") == []
    assert 'begins with #!' in check_script('echo\n')[0] and 'DOS' in ' '.join(check_script('#!/bin/sh\r\n'))


@pytest.mark.parametrize('time, seconds', {'90': 5400, '0:30': 30, '90:30': 5430, '1:30:30': 5430, '25:00:00': 90000, '2-12': 216000, '2-12:30': 217800,
                                           '1-00:00:01': 86401, '0': math.inf, 'infinite': math.inf, 'UNLIMITED': math.inf}.items())
def test_times(time, seconds): assert time_seconds(time) == seconds


@pytest.mark.parametrize('time', ['', '4h', '1:2:3:4', '1.5', ' 5', '5 ', '-1', '1-', '1-2:3:4:5', '٣'])
def test_no_times(time):
    with pytest.raises(ProfileError, match='is no time'): time_seconds(time)


# ---- profiles ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('values, message', [
    (dict(partion='gpu'), r"unknown field 'partion': did you mean 'partition'"),
    (dict(gpus='2'), r"gpus = '2': write a whole number"), (dict(gpus=True), 'write a whole number'), (dict(cpus=1.5), 'write a whole number'),
    (dict(requeue='yes'), 'write true or false'), (dict(modules='cuda'), 'write a list of texts'), (dict(env={'A': 1}), 'write a table of texts'),
    (dict(nodes=0), 'nodes = 0: at least 1'), (dict(gpus=-1), 'gpus = -1: at least 0'), (dict(warning=70000), 'at most 65535'),
    (dict(memory='1.5G'), 'memory'), (dict(memory='16 G'), 'memory'), (dict(time='4h'), "time: '4h' is no time"),
    (dict(time='2:00', warning=120), 'leaves nothing of time'), (dict(gres='gpu:1', gpus=1), 'ask for the same'),
    (dict(conda='a', activate='/b'), 'keep one'), (dict(env={'A-B': 'x'}), 'cannot be the name of a variable'),
    (dict(env={'A; rm': 'x'}), 'cannot be the name'), (dict(proxy='proxy:3128'), 'scheme'), (dict(modules=['']), 'is no name'),
    (dict(modules=['--force']), 'is no name'), (dict(sbatch=['--mem=3G']), 'has a field of its own: memory'), (dict(sbatch=['-t 5']), 'of its own: time'),
    (dict(sbatch=['--output=x']), 'is set when a job is submitted'), (dict(sbatch=['exclusive']), 'belongs to no option'),
    (dict(sbatch=['--exclusiv']), "did you mean 'exclusive'"), (dict(sbatch=['# x']), 'is no option'),
    (dict(sbatch=['--comment=a', '--comment=b']), 'stands there twice'), (dict(slurm=False, partition='gpu'), 'means nothing with slurm = false'),
    (dict(slurm=False, nodes=2), 'only this machine')])
def test_bad_values_are_named(values, message):
    with pytest.raises(ProfileError, match=message): Profile.from_dict(values, source='my.toml')


def test_all_faults_at_once():
    with pytest.raises(ProfileError) as e: Profile.from_dict(dict(nodes=0, memory='x', time='y'), source='my.toml')
    assert [line.split(':')[0] for line in str(e.value).split('\n')] == ['my.toml']*3


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    "The user's folder of profiles"
    monkeypatch.setenv('XDG_CONFIG_HOME', str(tmp_path))
    (tmp_path/'caption-nb').mkdir()
    return tmp_path/'caption-nb'


def test_ones_own_profiles_go_first(own):
    (own/'debug.toml').write_text('about = "mine"\ncpus = 3\n')
    (own/'broken.toml').write_text('about = \n')
    listed = profiles()
    assert listed['debug'] == (own/'debug.toml', 'mine') and 'cannot be read' in listed['broken'][1]
    assert load_profile('debug').cpus == 3 and load_profile('debug', cpus=4, time='', memory=None).cpus == 4
    with pytest.raises(ProfileError, match='is no TOML.*line 1'): load_profile('broken')
    with pytest.raises(ProfileError, match=f"no profile 'debgu', neither shipped nor in {own}: did you mean 'debug'"): load_profile('debgu')
    with pytest.raises(ProfileError, match='no such file'): load_profile(str(own/'none.toml'))
    with pytest.raises(ProfileError, match=r"debug.toml: unknown field 'tme': did you mean 'time'"): load_profile('debug', tme='1')


def test_variables_mean_what_they_mean_at_submission(own, monkeypatch):
    monkeypatch.setenv('HOME', '/homes/me'); monkeypatch.setenv('SITE', 'a$HOME'); monkeypatch.delenv('NOBODY', raising=False)
    file = own/'mine.toml'
    file.write_text('work = "~/work"\nactivate = "${HOME}/venv/bin/activate"\npython = "python3"\nscratch = "$TMPDIR/x"\n[env]\nA = "$SITE $(id) $"\nB = "~/b"\n')
    profile = load_profile('mine')
    assert (profile.work, profile.activate, profile.python, profile.scratch) == ('/homes/me/work', '/homes/me/venv/bin/activate', 'python3', '$TMPDIR/x')
    assert profile.env == {'A': 'a$HOME $(id) $', 'B': '/homes/me/b'}   # replaced once, never run
    assert Profile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
    for text, message in {'work = "$NOBODY/x"': 'work = .*the variable NOBODY is not set', 'env = { A = "${NOBODY}" }': 'env.A = .*NOBODY',
                          'work = "runs"': 'work = .*whole path', 'python = "bin/python"': 'python = .*whole path', 'activate = "~no-such-user/x"': 'activate = .*whole path'}.items():
        file.write_text(text)
        with pytest.raises(ProfileError, match=f'mine.toml: {message}'): load_profile('mine')
    monkeypatch.setenv('SITE', 'two\nlines')
    file.write_text('work = "/$SITE"')
    with pytest.raises(ProfileError, match='control character'): load_profile('mine')


SHIPPED = sorted(p.stem for p in (slurm_folder()/'profiles').glob('*.toml'))


@pytest.mark.parametrize('name', SHIPPED)
def test_shipped_profiles(name, own, tmp_path):
    profile = load_profile(name)
    assert profile.about and '#' in (slurm_folder()/'profiles'/f'{name}.toml').read_text()
    if profile.slurm: render(tmp_path, profile=profile)   # which checks the script


def test_the_shipped_ones_are_as_announced(own):
    assert SHIPPED == ['debug', 'gengpu', 'local', 'one-gpu', 'two-gpu', 'two-node', 'v100']
    ranks = {name: (p := load_profile(name)).nodes*p.tasks for name in SHIPPED}
    assert ranks == dict(debug=1, gengpu=2, local=1, v100=1, **{'one-gpu': 1, 'two-gpu': 2, 'two-node': 2})
    assert not load_profile('local').slurm


# ---- a real SLURM -----------------------------------------------------------------------------------------------

def sbatch(script: Path, *options: str) -> int:
    return int(subprocess.run(['sbatch', '--parsable', *options, script], check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize('name', [n for n in SHIPPED if n != 'local'])
def test_sbatch_would_take_the_shipped_ones(name, cluster, own, tmp_path):
    "With the small nodes and the partitions of the test cluster"
    profile = load_profile(name, cpus=1, memory='100M')
    gpus = profile.gpus or int((profile.gres or 'gpu:0').split(':')[-1])
    profile = dataclasses.replace(profile, partition='debug', gres=f'gpu:{gpus}' if profile.gres else '')
    done = subprocess.run(['sbatch', '--test-only', render(tmp_path, profile=profile)], capture_output=True, text=True)
    assert done.returncode == 0 and f'using {profile.nodes*profile.tasks} processors' in done.stderr


def test_our_options_are_those_of_sbatch(cluster):
    "Every option that this sbatch offers is known here, and has a value or not, as here"
    newer = {'container-id', 'extra', 'oom-kill-step', 'resv-ports', 'segment', 'stepmgr', 'tres-bind', 'tres-per-task'}
    offered = subprocess.run(['sbatch', '--help'], capture_output=True, text=True).stdout
    names = set(re.findall(r'^ +(?:-\w, +|-\w  +)?--([a-z][a-z-]+)', offered, re.M)) - {'help', 'usage', 'version', 'wrap', 'parsable', 'test-only'}
    assert len(names) > 80 and names <= SBATCH_OPTIONS.keys()
    for letter, name in re.findall(r'^ +-(\w), +--([a-z-]+)', offered, re.M): assert letter in 'hV' or module._SHORT[letter] == name
    for name, kind in SBATCH_OPTIONS.items():
        said = [subprocess.run(['sbatch', *words], stdin=subprocess.DEVNULL, capture_output=True, text=True).stderr
                for words in ([f'--{name}'], [f'--{name}=?', '--no-such-option'])]
        if 'unrecognized' in said[0]: assert name in newer or int(re.search(r'(\d+)', slurm_version())[1]) >= 25; continue
        assert ('requires an argument' in said[0]) == (kind == 'value'), name
        assert ("doesn't allow an argument" in said[1]) == (kind == 'flag'), name


def slurm_version() -> str: return subprocess.run(['sbatch', '--version'], capture_output=True, text=True).stdout


def test_names_and_logs_are_exactly_as_meant(cluster, tmp_path):
    "Nasty and random names, as single jobs and as arrays: the log lies where it should, the job is called what it should"
    dice, alphabet = random.Random(0), [c for c in map(chr, range(32, 0x250)) if c.isprintable() and c != '/']
    names = [*NASTY, *(''.join(dice.choices(alphabet, k=dice.randint(1, 20))) for _ in range(12))]
    waited = {}
    for i, name in enumerate(names):
        folder = tmp_path/str(i)/(name.replace('\\', '_').replace('/', '_').strip('.') or 'x')
        folder.mkdir(parents=True)
        array = '1-2' if i % 5 == 0 else ''
        profile = Profile(name='debug', python='/bin/echo', cpus=1, memory='10M')
        script = render(tmp_path/str(i), profile=profile, job_name=name, command=['it is', TASK], chdir=folder, log=folder/('l-%A_%a' if array else 'l-%j'), array=array)
        waited[sbatch(script)] = name, folder, array
    for job, (name, folder, array) in waited.items():
        if not array: cluster.wait(job)
        else: until(lambda: all(s == 'COMPLETED' for s in cluster.states(job)) and len(cluster.states(job)) == 2, 60)
        assert {p.name: p.read_text() for p in folder.iterdir()} == ({f'l-{job}_{t}': f'it is {t}\n' for t in (1, 2)} if array else {f'l-{job}': 'it is 0\n'})
        shown = subprocess.run(['scontrol', 'show', 'job', str(job)], capture_output=True, text=True).stdout
        assert shown.splitlines()[0].partition('JobName=')[2] == name


FIRST_TIME = '[ "$1" = run ] || exit 1\ntouch "$here/ready"\n[ -n "$SLURM_RESTART_COUNT" ] && exit 0\n'


def test_the_last_task_of_an_array_requeues_alone(cluster, tmp_path):
    shell(tmp_path, FIRST_TIME + '[ "$SLURM_JOB_ID" = "$SLURM_ARRAY_JOB_ID" ] && { /bin/sleep 1; exit 85; }; exit 0', scontrol='#!/bin/sh\nexec /usr/bin/scontrol "$@"\n',
          command=['run', TASK], array='0-2', profile=Profile(name='debug', python=str(tmp_path/'python'), memory='10M'), log=tmp_path/'log-%A_%a')
    job = sbatch(tmp_path/'job.sh')
    until(lambda: len(lines(tmp_path/'said')) == 4 and cluster.states(job) == ['COMPLETED']*3, 60)
    assert sorted(lines(tmp_path/'said')) == ['run 0', 'run 1', 'run 2', 'run 2']


def test_slurm_and_the_script_requeue_at_once(cluster, tmp_path):
    "A program that wants to be requeued while SLURM does it: it runs again once, not twice"
    shell(tmp_path, FIRST_TIME + 'trap "exit 85" TERM; while :; do /bin/sleep 0.05; done', scontrol='#!/bin/sh\nexec /usr/bin/scontrol "$@"\n',
          profile=Profile(name='debug', python=str(tmp_path/'python'), memory='10M'))
    job = sbatch(tmp_path/'job.sh')
    until((tmp_path/'ready').exists)
    cluster.run('scontrol', 'requeue', str(job))
    cluster.wait(job, timeout=60)
    assert lines(tmp_path/'said') == ['run', 'run'] and cluster.info(job)['Restarts'] == '1'
