"""`vit-efficient plan MODEL --images FOLDER … --img-size 1024 --budget 0.4 --out plan.yaml`."""

import argparse
from pathlib import Path

from vit_efficient_cli.parsing import check_exists


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        'The table says what each attention costs in each layer alone; what was chosen is bold. The file that --out '
        'names is what vit_efficient.convert takes.'
    )
    parser.add_argument('model', help="timm's name of a pretrained model, or a run or model folder")
    about = 'folders of photographs; a few are enough, of the kind that the model is for'
    parser.add_argument('--images', nargs='+', type=Path, required=True, metavar='FOLDER', help=about)
    parser.add_argument('--img-size', type=int, required=True, metavar='PX', help='side of the square images')
    about = 'what the model may cost, as a share of what it costs as it is, such as 0.4 or 1/2'
    parser.add_argument('--budget', metavar='SHARE', help=about)
    about = 'several; prints what each buys, with the time and the memory of an image'
    parser.add_argument('--budgets', nargs='+', metavar='SHARE', help=about)
    about = 'of the budget: gmacs (default), ms (measured) or keys'
    parser.add_argument('--unit', choices=('gmacs', 'ms', 'keys'), default='gmacs', help=about)
    about = 'attentions that a layer may have instead of its own (default: several that the model can have)'
    parser.add_argument('--options', nargs='+', metavar='NAME[:KEY=VALUE,…]', help=about)
    about = 'of the final features: a cosine, centred (default), patch or prefix, or the squared error'
    parser.add_argument('--loss', choices=('centred', 'patch', 'error', 'prefix'), default='centred', help=about)
    about = 'images that are measured, taken evenly from all (default: %(default)s)'
    parser.add_argument('--limit', type=int, default=16, metavar='N', help=about)
    parser.add_argument('--enlarge', action='store_true', help='enlarge smaller images instead of leaving them out')
    about = 'plans next to the best so far that are tried at most (default: %(default)s)'
    parser.add_argument('--refine', type=int, default=8, metavar='N', help=about)
    parser.add_argument('--out', type=Path, metavar='FILE.yaml', help='of the plan; a picture, .png, goes beside it')
    about = 'JSON that keeps what is measured: stopped, the same command goes on'
    parser.add_argument('--measured', type=Path, metavar='FILE.json', help=about)
    parser.add_argument('--no-memory', dest='memory', action='store_false', help='with --budgets: without peak memory')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, … (default: %(default)s)')


def run(args: argparse.Namespace) -> None:
    for path in args.images:
        check_exists(path, 'folder of images')
    from vit_efficient.planning import Planner
    from vit_efficient.report.evaluation import open_model
    from vit_efficient.report.plans import front_table, open_images, plot_plan, sensitivity_table
    from vit_efficient.utils.checks import as_integer, as_share
    from vit_efficient.utils.device import choose_device
    from vit_efficient.utils.errors import UserError
    from vit_efficient.utils.files import check_can_write
    from vit_efficient.utils.options import parse_spec, parse_value
    from vit_efficient.utils.packages import import_optional

    if bool(args.budget) == bool(args.budgets):
        raise UserError('give --budget, or several as --budgets')
    # The smallest first: if it cannot be had, that is known before anything is measured.
    budgets = sorted({as_share('--budget', parse_value(text)) for text in args.budgets or [args.budget]})
    if args.out and args.out.suffix not in ('.yaml', '.yml'):
        raise UserError(f'--out must end in .yaml, got {args.out}')
    if args.out:  # rather than when all is measured
        import_optional('matplotlib', 'the picture beside --out is drawn with', 'train')
        check_can_write(args.out)
    device, img_size = choose_device(args.device, '--device'), as_integer('--img-size', args.img_size)
    options = None if args.options is None else [parse_spec(text) for text in args.options]
    limit = as_integer('--limit', args.limit)
    model, preprocessing = open_model(args.model, img_size)
    images = open_images(args.images, preprocessing, limit, args.enlarge)
    planner = Planner(model.to(device), images, options, args.unit, args.loss, args.measured)
    plans = [planner.plan(budget, args.refine) for budget in budgets]
    for plan in plans:
        if not args.budgets:
            print(sensitivity_table(planner, plan).render())
            print(
                f'{plan.share:.3f} of the {plan.unit}, {plan.gmacs[0]:.4g} → {plan.gmacs[1]:.4g} GMACs; loss '
                f'({plan.loss}) {plan.measured:.4g} measured, {plan.predicted:.4g} predicted'
            )
        if args.out:
            out = args.out.with_stem(f'{args.out.stem}-{plan.budget:g}') if args.budgets else args.out
            plan.save(out)
            plot_plan(planner, plan, out.with_suffix('.png'))
            print(f'saved {out} and {out.with_suffix(".png")}')
    if args.budgets:
        print(front_table(planner, plans, memory=args.memory).render(), end='')
