"""The commands, as a user runs them: real processes, another folder, both spellings, breaks, mistakes."""
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest

from kdnotes.metrics import read_ledger, summarise

BIN = Path(sys.executable).parent
ENV = {**os.environ, 'OMP_NUM_THREADS': '1', 'TQDM_DISABLE': '1'}
DATA = os.environ.get('KDNOTES_DATA')


def run(program, *flags, cwd, ok=True, env=ENV):
    done = subprocess.run([BIN / program, *map(str, flags)], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    if ok: assert done.returncode == 0, done.stderr
    return done


def quick(out, *more): return ('--recipe', 'scenes', '--out', out, '--seeds', 2, '--max_steps', 2, '--methods', 'channel_wise', *more)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    place = tmp_path_factory.mktemp('compare')
    run('kdnotes_compare', *quick('out', '--ledger', 'quick'), cwd=place)
    return place


def test_results_have_the_promised_form(finished):
    results = json.loads((finished / 'out/results.json').read_text())
    assert list(results) == ['recipe', 'metric', 'higher_is_better', 'device', 'versions', 'commit', 'command', 'teacher', 'student', 'runs', 'summary']
    assert set(results['teacher']) == {'params', 'flops', 'metrics'} and set(results['student']) == {'params', 'flops'}
    assert [(r['method'], r['seed']) for r in results['runs']] == [('none', 0), ('channel_wise', 0), ('none', 1), ('channel_wise', 1)]
    assert all(set(r) == {'method', 'seed', 'metrics', 'seconds'} and 0 <= r['metrics']['miou'] <= 1 for r in results['runs'])
    none, channel = results['summary']
    assert (none['gain'], none['gain_low'], none['gain_high']) == (0., 0., 0.) and channel['gain_low'] < channel['gain'] < channel['gain_high']
    assert results['summary'] == summarise(results['runs'], 'miou')
    assert results['teacher']['metrics']['miou'] > 0 and results['teacher']['params'] > results['student']['params']


def test_the_ledger_is_the_same_file(finished):
    assert read_ledger(finished / 'data/ledger/quick.json') == json.loads((finished / 'out/results.json').read_text())


def test_the_report_stands_alone(finished):
    page = (finished / 'out/report.html').read_text()
    assert 'data:image/png' in page and 'channel_wise' in page
    assert 'http' not in re.sub(r'data:image/png;base64,[^"]*', '', page)


def test_the_same_command_again_trains_nothing(finished):
    stamps = {p: p.stat().st_mtime_ns for p in finished.rglob('record.json')}
    before = json.loads((finished / 'out/results.json').read_text())
    began = time.time()
    run('kdnotes_compare', *quick('out'), cwd=finished)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob('record.json')} == stamps and time.time() - began < 90
    assert json.loads((finished / 'out/results.json').read_text())['runs'] == before['runs']


def test_hyphens_are_the_same_flags(finished):
    flags = ('--recipe', 'scenes', '--out', 'out', '--seeds', 2, '--max-steps', 2, '--methods', 'channel_wise', '--data-root', 'ignored')
    run('kdnotes_compare', *flags, cwd=finished)


def test_another_setting_is_refused_by_name(finished):
    done = run('kdnotes_compare', '--recipe', 'scenes', '--out', 'out', '--seeds', 2, '--max_steps', 3, cwd=finished, ok=False)
    assert done.returncode == 2 and 'max_steps: 2, now 3' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.parametrize('flags, words', [
    (('--recipe', 'scene'), "no recipe 'scene'"), (('--recipe', 'scenes', '--methods', 'pixelwise'), "no method"), (('--recipe', 'scenes', '--seeds', 0), 'seeds must be 1'),
    (('--recipe', 'scenes', '--max_steps', 0), 'max_steps must be 1'), (('--recipe', 'camvid', '--data_root', 'nowhere'), 'nowhere'), (('--recipe', 'scenes', '--ledger', 'a/b'), 'plain name')])
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, flags, words):
    done = run('kdnotes_compare', *flags, '--out', 'out', cwd=tmp_path, ok=False)
    assert done.returncode == 2 and words in done.stderr and 'Traceback' not in done.stderr and not (tmp_path / 'out').exists()


def test_no_data_root_says_both_ways(tmp_path):
    env = {k: v for k, v in ENV.items() if k != 'KDNOTES_DATA'}
    done = run('kdnotes_compare', '--recipe', 'camvid', '--out', 'out', cwd=tmp_path, ok=False, env=env)
    assert done.returncode == 2 and '--data_root' in done.stderr and 'KDNOTES_DATA' in done.stderr


def break_off(flags, cwd, until, sign):
    "Start the command in a session of its own, wait until a file exists, signal the whole group as a terminal does."
    process = subprocess.Popen([BIN / 'kdnotes_compare', *map(str, flags)], cwd=cwd, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (cwd / until).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(.02)
    os.killpg(process.pid, sign)
    return (process.communicate(timeout=120)[1], process.returncode)


def test_broken_off_and_continued_gives_the_same_numbers(tmp_path):
    flags = ('--recipe', 'scenes', '--out', 'out', '--seeds', 1, '--max_steps', 40, '--methods', 'channel_wise')
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    whole.mkdir(); broken.mkdir()
    run('kdnotes_compare', *flags, cwd=whole)
    err, code = break_off(flags, broken, 'out/settings.json', signal.SIGINT)                    # while the teacher is prepared or trained
    assert code == 130 and 'the same command continues' in err and not (broken / 'out/teacher/record.json').exists()
    break_off(flags, broken, 'out/teacher/record.json', signal.SIGKILL)                         # between teacher and student
    assert not (broken / 'out/results.json').exists()
    err, code = break_off(flags, broken, 'out/runs/none-0/weights.safetensors', signal.SIGINT)
    assert code == 130 and not (broken / 'out/results.json').exists()
    run('kdnotes_compare', *flags, cwd=broken)
    a, b = (json.loads((p / 'out/results.json').read_text()) for p in (whole, broken))
    assert [r['metrics'] for r in a['runs']] == [r['metrics'] for r in b['runs']] and a['teacher'] == b['teacher']


def test_a_training_run_does_not_overwrite_a_comparison(finished):
    done = run('kdnotes_train', '--recipe', 'scenes', '--method', 'channel_wise', '--max_steps', 2, '--out', 'out', '--resume', cwd=finished, ok=False)
    assert done.returncode == 2 and "kind: 'compare', now 'train'" in done.stderr


def test_train_one_method(finished, tmp_path):
    flags = ('--recipe', 'scenes', '--method', 'channel_wise', '--seed', 1, '--max_steps', 2, '--out', 'one')
    run('kdnotes_train', *flags, cwd=tmp_path)
    one, all_ = (json.loads(p.read_text()) for p in (tmp_path / 'one/results.json', finished / 'out/results.json'))
    assert [r for r in all_['runs'] if (r['method'], r['seed']) == ('channel_wise', 1)][0]['metrics'] == one['runs'][0]['metrics'] and set(one) == set(all_)
    assert (tmp_path / 'one/runs/channel_wise-1/weights.safetensors').exists()
    again = run('kdnotes_train', *flags, cwd=tmp_path, ok=False)
    assert again.returncode == 2 and 'holds a run already' in again.stderr
    run('kdnotes_train', *flags, '--resume', cwd=tmp_path)


@pytest.mark.skipif(not DATA, reason='set KDNOTES_DATA to the folder with camvid/')
def test_camvid_for_real(tmp_path):
    run('kdnotes_train', '--recipe', 'camvid', '--method', 'channel_wise', '--max_steps', 1, '--data_root', DATA, '--out', 'out', cwd=tmp_path)
    results = json.loads((tmp_path / 'out/results.json').read_text())
    assert 0 <= results['runs'][0]['metrics']['miou'] < .5 and sum(k.startswith('iou/') for k in results['runs'][0]['metrics']) == 11


def test_the_doctor_finds_an_untrained_teacher_and_a_run_may_follow(tmp_path):
    flags = ('--recipe', 'scenes', '--out', 'run', '--max_steps', 2)
    done = run('kdnotes_doctor', *flags, '--claimed', .7, cwd=tmp_path, ok=False)
    assert done.returncode == 1 and done.stdout.startswith('Not as it should be: faults:') and 'remedy:' in done.stdout, done.stderr
    run('kdnotes_train', *flags, '--method', 'channel_wise', cwd=tmp_path)
    done = run('kdnotes_doctor', *flags[:-1], 3, cwd=tmp_path, ok=False)
    assert done.returncode == 2 and 'max_steps: 2, now 3' in done.stderr


def test_a_teacher_cache_is_filled_once_and_changes_rounding_only(finished, tmp_path):
    run('kdnotes_compare', *quick('out', '--teacher-cache', 'answers'), cwd=tmp_path)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / 'answers').rglob('*') if p.is_file()}
    assert files
    run('kdnotes_compare', *quick('out', '--teacher_cache', 'answers'), cwd=tmp_path)
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / 'answers').rglob('*') if p.is_file()}
    cached, live = ({(r['method'], r['seed']): r['metrics']['miou'] for r in json.loads((place / 'out/results.json').read_text())['runs']} for place in (tmp_path, finished))
    assert all(cached['none', seed] == live['none', seed] for seed in (0, 1)) and all(abs(cached[k] - live[k]) < .01 for k in live)
    assert run('kdnotes_compare', *quick('out'), cwd=tmp_path, ok=False).returncode == 2      # answered live, it would be another comparison
