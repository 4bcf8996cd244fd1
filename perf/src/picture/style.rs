//! Colours and type, for light and dark surroundings.
//!
//! The colours of data are those of Okabe and Ito ("Color Universal Design", 2008), which people who see colours
//! differently can tell apart; lighter ones of the same hues on dark grounds.

/// The style of pictures. `s` classes are lines, `f` surfaces, `w` faint surfaces, and `t` texts of a colour.
pub(crate) const PICTURE: &str = "\
:root{color-scheme:light dark;--ground:#fff;--ink:#1b1d21;--soft:#62676f;--hair:#e4e5e7;--axis:#a9adb3;\
--blue:#0072b2;--orange:#d55e00;--green:#00805e;--purple:#a9508a;--amber:#b87a00}\
@media(prefers-color-scheme:dark){:root{--ground:#15171b;--ink:#eceded;--soft:#9ba1a9;--hair:#2a2e34;--axis:#5c626b;\
--blue:#5bb5ee;--orange:#ff8f52;--green:#3ccba0;--purple:#e39bc9;--amber:#f0b840}}\
svg text{font:12px/1 Inter,system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif;\
fill:var(--ink);font-variant-numeric:tabular-nums}\
svg .title{font-weight:600;font-size:13px}\
svg .soft,svg .tick{fill:var(--soft)}svg .tick{font-size:11px}svg .small{font-size:10.5px}svg .strong{font-weight:600}\
.grid,.axis,.mark,.dash{fill:none;stroke-width:1;shape-rendering:crispEdges}\
.grid{stroke:var(--hair)}.axis{stroke:var(--axis)}.mark{stroke:var(--ink)}\
.dash{stroke:var(--soft);stroke-dasharray:4 3}\
.hair{fill:var(--hair)}\
.s-blue,.s-orange,.s-green,.s-purple,.s-amber,.s-soft{fill:none;stroke-width:1.5;stroke-linejoin:round}\
.s-blue{stroke:var(--blue)}.s-orange{stroke:var(--orange)}.s-green{stroke:var(--green)}\
.s-purple{stroke:var(--purple)}.s-amber{stroke:var(--amber)}.s-soft{stroke:var(--soft)}\
.f-blue,.w-blue,svg .t-blue{fill:var(--blue)}.f-orange,.w-orange,svg .t-orange{fill:var(--orange)}\
.f-green,.w-green,svg .t-green{fill:var(--green)}.f-purple,.w-purple,svg .t-purple{fill:var(--purple)}\
.f-amber,.w-amber,svg .t-amber{fill:var(--amber)}.f-soft,.w-soft{fill:var(--soft)}\
.w-blue,.w-orange,.w-green,.w-purple,.w-amber,.w-soft{fill-opacity:.16}\
.ring{stroke:var(--ground);stroke-width:1.5}.thin{stroke-width:1}.thick{stroke-width:2.5}";

/// The style of the page around the pictures.
pub(crate) const PAGE: &str = "\
*{box-sizing:border-box}\
body{margin:0;background:var(--ground);color:var(--ink);\
font:15px/1.55 Inter,system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}\
main{max-width:1000px;margin:0 auto;padding:48px 20px 80px}\
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;margin:0 0 6px}\
h2{font-size:21px;line-height:1.3;letter-spacing:-.01em;margin:64px 0 4px;padding-top:20px;border-top:1px solid var(--hair)}\
h3{font-size:15px;margin:36px 0 2px}\
p{margin:0 0 10px;max-width:46em}.soft{color:var(--soft)}\
figure{margin:12px 0 0;overflow-x:auto}figure svg{display:block;width:100%;min-width:680px;height:auto}\
figcaption{color:var(--soft);font-size:13px;max-width:70em;margin-top:6px}\
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;margin:10px 0}\
th{font-weight:500;color:var(--soft);text-align:left}td,th{padding:4px 18px 4px 0;border-bottom:1px solid var(--hair)}\
td{white-space:nowrap}td.number,th.number{text-align:right}.wide{overflow-x:auto}\
nav{margin:18px 0 0}nav a{margin-right:16px}a{color:var(--blue);text-decoration:none}a:hover{text-decoration:underline}\
@media print{h2{break-before:page}figure{break-inside:avoid}}";
