"""What is the same for all commands: how they end, what they say on the way, and what they make of slips."""

import importlib
import io
import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from tqdm import tqdm

from vit_efficient.utils.errors import UserError
from vit_efficient_cli import COMMANDS, main


@pytest.fixture
def plot(monkeypatch):
    """Puts another function in the place of the plot command."""

    def put(run):
        module = SimpleNamespace(add_arguments=lambda parser: parser.add_argument('--values'), run=run)
        monkeypatch.setitem(sys.modules, 'vit_efficient_cli.plot', module)

    return put


def raising(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize('error', [UserError('one\ntwo'), FileNotFoundError(2, 'one two')])
def test_what_a_user_can_mend_is_one_line(plot, error, capsys):
    plot(raising(error))
    assert main(['plot']) == 2
    err = capsys.readouterr().err
    assert err.startswith('vit-efficient plot: error: ') and err.endswith('one two\n') and err.count('\n') == 1
    for argv in (['--debug', 'plot'], ['plot', '--debug']):
        with pytest.raises(type(error), match='one'):
            main(argv)


@pytest.mark.parametrize('error', [ValueError, TypeError, RuntimeError])
def test_a_bug_keeps_its_traceback(plot, error):
    plot(raising(error('a bug')))
    with pytest.raises(error, match='a bug'):
        main(['plot'])


@pytest.mark.parametrize('encoding, printed', [('utf-8', '± ²'.encode()), ('ascii', rb'\xb1 \xb2')])
def test_what_a_terminal_cannot_show_is_spelt_out(plot, encoding, printed, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding))
    plot(lambda args: print('± ²', os.fsdecode(b'caf\xe9'), end=''))
    assert main(['plot']) == 0
    assert sys.stdout.buffer.getvalue() == printed + rb' caf\udce9'


def test_interrupts(plot, capsys):
    plot(raising(KeyboardInterrupt()))
    assert main(['plot']) == 130
    assert capsys.readouterr().err == 'vit-efficient plot: interrupted\n'
    with pytest.raises(KeyboardInterrupt):
        main(['plot', '--debug'])


@pytest.mark.subprocess
def test_a_reader_that_has_gone():
    """As `head` does, it ends the command, which has nothing to say to that. Other pipes that break are errors."""
    code = (
        'import sys; from types import SimpleNamespace; from vit_efficient_cli import COMMANDS, main\n'
        'def run(args):\n'
        '    if args.values:\n'
        '        raise BrokenPipeError(32, "of a worker")\n'
        '    print("table")\n'
        'add = lambda parser: parser.add_argument("--values")\n'
        'sys.modules["vit_efficient_cli.plot"] = SimpleNamespace(add_arguments=add, run=run)\n'
        'sys.exit(main(sys.argv[1:]))\n'
    )
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, '-c', code, 'plot']
    for unbuffered in ('', '1'):
        environment = {**os.environ, 'PYTHONUNBUFFERED': unbuffered}
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
        assert (done.returncode, done.stderr) == (141, '')
    os.close(writer)
    done = subprocess.run([*command, '--values', 'x'], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, 'vit-efficient plot: error: [Errno 32] of a worker\n')


def test_messages_are_lines_of_the_first_process(plot, monkeypatch, capsys):
    logger = logging.getLogger('vit_efficient.somewhere')
    before = logging.getLogger('vit_efficient').handlers[:]

    def run(args):
        with tqdm(total=2, file=sys.stderr) as bar:
            bar.update()
            logger.warning('mind %s', 'this')
            logger.debug('not this')
        logger.info('or that')

    plot(run)
    assert main(['plot']) == 0
    lines = capsys.readouterr().err.replace('\r', '\n').splitlines()
    assert lines.count('mind this') == lines.count('or that') == 1 and 'not this' not in lines
    monkeypatch.setenv('RANK', '1')
    assert main(['plot']) == 0
    err = capsys.readouterr().err
    assert 'mind' not in err and 'or that' not in err
    assert logging.getLogger('vit_efficient').handlers == before


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['trian'], 'did you mean train?'),
        (['table', 'flop'], 'did you mean flops?'),
        (['truncate', 'image.png', '--order', 'zigzg'], 'did you mean zigzag?'),
        (['evaluate', 'run', '--dta', 'val'], 'unknown option --dta; did you mean --data?'),
        (
            ['evaluate', 'run', '--data', 'val', '--batchsize=3'],
            'unknown option --batchsize; did you mean --batch-size?',
        ),
        (['table', 'accuracy', 'a.yaml', '--sedes', '3'], 'unknown option --sedes; did you mean --seeds?'),
        (['train'], 'train: error: the following arguments are required: recipe; `vit-efficient recipe list` shows'),
        (['recipe', 'copy'], 'the following arguments are required: RECIPE; `vit-efficient recipe list` shows'),
        (['table', 'accuracy'], 'the following arguments are required: RECIPE; `vit-efficient recipe list` shows'),
        (
            ['plot'],
            'vit-efficient plot: error: the following arguments are required: RUN (see vit-efficient plot --hel',
        ),
    ],
)
def test_slips_are_answered_with_the_nearest_on_one_line(argv, message, capsys):
    with pytest.raises(SystemExit, match='2'):
        main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and line.endswith(' --help)')


def test_errors_of_the_system_name_the_file_and_what_is_wrong(plot, capsys):
    plot(raising(PermissionError(13, 'Permission denied', 'a/b')))
    assert main(['plot']) == 2
    assert capsys.readouterr().err == 'vit-efficient plot: error: a/b: Permission denied\n'


def test_options_may_be_shortened(plot):
    found = []
    plot(lambda args: found.append(args.values))
    assert main(['plot', '--val', 'x']) == 0 and found == ['x']


def test_version(capsys):
    with pytest.raises(SystemExit, match='0'):
        main(['--version'])
    assert re.fullmatch(r'vit-efficient \S+, torch \S+, timm \S+\n', capsys.readouterr().out)


@pytest.mark.parametrize(
    'command',
    [
        ['--help'],
        ['--version'],
        ['recipe', 'list'],
        ['recipe', 'copy', 'imagez'],
        ['trian'],
        ['train', 'nothing.yaml'],
        ['evaluate', 'runs/nothing', '--data', 'val'],
        ['export', 'runs/nothing', '--out', 'a.onnx'],
        ['leaves', 'runs/nothing', 'a.png'],
        ['plot', 'runs/nothing'],
        ['truncate', 'nothing.png'],
        ['table', 'accuracy', 'nothing.yaml'],
        *([name, '--help'] for name in COMMANDS),
        *(['table', name, '--help'] for name in ('flops', 'accuracy')),
        *(['benchmark', name, '--help'] for name in ('layer', 'model')),
    ],
    ids=' '.join,
)
def test_answers_that_wait_for_no_import(command, monkeypatch, capsys):
    """Help, slips and missing files are answered before PyTorch and timm are imported, which takes seconds."""

    class Refusing:
        def find_spec(self, name, path=None, target=None):
            if name.partition('.')[0] in ('vit_efficient', 'torch', 'timm', 'numpy', 'yaml'):
                raise AssertionError(f'{name} is imported')

    for name in [
        name for name in sys.modules if re.match(r'(vit_efficient|vit_efficient_cli|torch|timm|numpy|yaml)\b', name)
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, 'meta_path', [Refusing(), *sys.meta_path])
    try:
        assert importlib.import_module('vit_efficient_cli').main(command) in (0, 2)
    except SystemExit as end:
        assert end.code in (0, 2)
    out, err = capsys.readouterr()
    assert out or err
    assert (err.count('no such') == 1) == any('nothing' in word or 'imagez' in word for word in command)
