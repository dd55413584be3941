# SPDX-License-Identifier: Apache-2.0
"""`gfast audit`: did each update of a run remove what it should and spare the rest? One page for a person who signs it.

    gfast audit run
    gfast audit run --beside other-run --harm 0.05 --out audit

Every update whose G-effect was recorded is judged: the unlearn G-effect clearly negative, the retain G-effect not
negative; and the NLL that came out: forget risen, retain by a tenth at most. `audit.html` has the verdict in one
sentence, the updates that did not pass, a figure, the settings, SHA-256 of models, data and records, and a place for a
signature; `audit.json` has the same as numbers. The exit code is 0 where all of it passed, 1 where something did not,
and 2 where the run cannot be judged (no G-effect was recorded, a file is damaged).
"""

from __future__ import annotations

from pathlib import Path

from gfast.commands.parser import Parser


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="gfast audit", description=__doc__.partition(": ")[2].partition("\n\n")[0])
    parser.add_argument("run", metavar="RUN", help="folder that gfast unlearn or a GEffectCallback wrote")
    parser.add_argument("--out", help="folder of the page (default: the run's own)")
    parser.add_argument("--objective", help="whose G-effect to judge by, where several are recorded")
    parser.add_argument("--beside", nargs="+", default=[], metavar="RUN", help="runs to compare at equal forget NLL")
    parser.add_argument(
        "--flat", type=float, default=1e-3, help="cosines below this are no direction (default: %(default)s)"
    )
    parser.add_argument(
        "--harm",
        type=float,
        default=0.0,
        help="how negative the retain effect may be, as a share of the unlearn effect (default: %(default)s)",
    )
    parser.add_argument(
        "--rise",
        type=float,
        default=1.1,
        help="how far the retain NLL may rise in the end, as a multiple of its start (default: %(default)s)",
    )
    options = parser.parse_args(argv)

    from gfast.files import require_writable
    from gfast.report.audit import Criteria, audit

    criteria = Criteria(options.flat, options.harm, options.rise)
    if options.out is not None or Path(options.run).is_dir():
        require_writable(options.run if options.out is None else options.out)
    page, record = audit(options.run, criteria, options.objective, options.beside, options.out)
    print(record["verdict"])
    print(f"Page to read and sign: {page}")
    return 0 if record["passed"] else 1
