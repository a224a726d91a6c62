"""How the page looks, and the little that moves: values under the pointer."""

CSS = """
:root{color-scheme:light dark;--ground:#fff;--ink:#1f2328;--faint:#59636e;--line:#d8dee4;
--soft:#f6f8fa;--off:#a8480a;--off-soft:#fff1e5}
@media (prefers-color-scheme:dark){:root{--ground:#0f1318;--ink:#e6e9ec;--faint:#9aa5b0;
--line:#2c343d;--soft:#181e25;--off:#f2a65e;--off-soft:#33230f}.ink,i.line,i.dash,i.dot{filter:brightness(1.35)}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",
Helvetica,"DejaVu Sans",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:26px;line-height:1.25;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:20px;margin:44px 0 12px;padding-top:14px;border-top:1px solid var(--line)}
h3,summary,caption{font-size:15px;font-weight:600}
h3{margin:22px 0 6px}
p{margin:8px 0;max-width:80ch;overflow-wrap:anywhere}
.sub,.note,.axis,figcaption span,small{color:var(--faint)}
.sub{max-width:none}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin-top:14px}
a{color:inherit;text-decoration-color:var(--faint);text-underline-offset:3px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;
margin:22px 0 0}
.plots figure:last-child:nth-child(odd){grid-column:1/-1}
.tiles div{background:var(--soft);border-radius:8px;padding:10px 14px}
.tiles dt{color:var(--faint);font-size:13px;line-height:1.35}
.tiles dd{margin:2px 0 0;font-size:22px;font-weight:600;font-variant-numeric:tabular-nums}
.tiles small{display:block;font-size:13px;font-weight:400}
.beside{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,350px),1fr));
gap:8px 28px}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));
gap:26px 36px;margin:14px 0}
.table{overflow-x:auto;margin:10px 0 18px}
table{border-collapse:collapse;font-size:14px}
.beside table{width:100%}
caption{text-align:left;padding:4px 0}
th,td{padding:4px 14px 4px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:400}
thead th{color:var(--faint);font-size:13px;vertical-align:bottom;overflow-wrap:anywhere}
tbody th{position:sticky;left:0;background:var(--ground);min-width:8.5em}
td.n,th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td.w{overflow-wrap:anywhere;min-width:8em}
td:last-child,th:last-child{padding-right:4px}
td small{display:block;font-size:12px}
.tight td small{display:inline-block;margin-left:5px;min-width:2.9em}
.tight th,.tight td{padding-right:8px}
.beside tbody th{min-width:6.5em}
tr.group th,tr.group td{font-weight:600;padding-top:14px;color:var(--ink)}
tr.total th,tr.total td{font-weight:600;border-top:1px solid var(--faint)}
td.off{color:var(--off);background:var(--off-soft)}
td.off small{color:inherit}
details{margin:10px 0}
summary{cursor:pointer}
pre{background:var(--soft);border-radius:8px;padding:10px 14px;font-size:13px;white-space:pre-wrap;
overflow-wrap:anywhere;margin:6px 0 14px}
pre span{display:inline-block;max-width:100%}
figure{margin:0;min-width:0}
figcaption{margin-bottom:8px;line-height:1.35}
.frame{display:grid;grid-template-columns:auto 1fr;grid-template-rows:230px 20px;column-gap:8px;
font-size:12px;color:var(--faint);font-variant-numeric:tabular-nums}
.ys{position:relative;min-width:4.2em}
.ys span{position:absolute;right:0;transform:translateY(-50%);white-space:nowrap}
.area{position:relative;touch-action:pan-y}
.area svg{display:block;width:100%;height:100%;overflow:visible}
.xs{grid-column:2;position:relative}
.xs span{position:absolute;top:3px;transform:translateX(-50%);white-space:nowrap}
.xs span:first-child{transform:none}
.xs .end{transform:translateX(-100%)}
.axis{text-align:right;font-size:12px;margin:0}
polyline,path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round}
polygon{stroke:var(--ground);stroke-width:.7;vector-effect:non-scaling-stroke}
.grid{stroke:var(--line)}
.base{stroke:var(--faint)}
.dots{stroke-width:8;stroke-linecap:round}
.key{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:6px 0 0;padding:0;
font-size:13px}
.key.rows{display:block;columns:210px;column-gap:20px}
.key.rows li{display:flex;align-items:baseline;break-inside:avoid}
.key.rows b{margin-left:auto;padding-left:8px}
.tall .frame{grid-template-rows:340px 20px}
.halo{stroke:var(--ground)}
.key b{font-weight:600;font-variant-numeric:tabular-nums}
.key i{display:inline-block;width:16px;margin-right:6px;vertical-align:middle;
border-top:3px solid currentColor}
.key .dash{border-top-style:dashed;border-top-width:2px}
.key .box,.key .dot{width:11px;height:11px;border:0;background:currentColor;border-radius:2px}
.key .dot{border-radius:50%}
.rule{position:absolute;top:0;bottom:0;width:1px;background:var(--faint);pointer-events:none}
.tip{position:absolute;top:6px;z-index:2;pointer-events:none;background:var(--ground);
border:1px solid var(--line);border-radius:6px;padding:5px 9px;color:var(--ink);white-space:nowrap;
box-shadow:0 2px 8px #0003}
.tip div{display:flex;justify-content:space-between;gap:14px}
@media (max-width:600px){main{padding:18px 14px 48px}h1{font-size:22px}h2{margin-top:32px}
.tiles{grid-template-columns:1fr 1fr}.tiles dd{font-size:19px}.frame{grid-template-rows:190px 20px}
.tall .frame{grid-template-rows:280px 20px}
.xs span:has(+.end){display:none}
th,td{padding-right:10px}tbody th{min-width:7.5em}}
@media print{nav{display:none}figure,tr,.tiles{break-inside:avoid}}
"""

# Reads the values back from the drawn lines; without it the page lacks nothing but this.
SCRIPT = """
for (const area of document.querySelectorAll(".area")) {
  const svg = area.querySelector("svg"), rule = document.createElement("div");
  const tip = document.createElement("div"), data = svg.dataset;
  const xMax = +data.x, low = +data.low, high = +data.high;
  rule.className = "rule"; tip.className = "tip"; rule.hidden = tip.hidden = true;
  area.append(rule, tip);
  const lines = [...svg.querySelectorAll("[data-name]")].map(shape => ({
    name: shape.dataset.name, stacked: shape.tagName == "polygon",
    points: shape.getAttribute("points").split(" ").map(pair => pair.split(",").map(Number))}));
  for (const line of lines) if (line.stacked) line.points.splice(-2);
  const at = (points, x) => {
    const i = points.findIndex(point => point[0] >= x);
    if (i < 0 || i == 0 && points[0][0] > x + 15) return NaN;
    const [[a, b], [c, d]] = [points[Math.max(i - 1, 0)], points[i]];
    return low + (1000 - (c > a ? b + (d - b) * (x - a) / (c - a) : d)) / 1000 * (high - low);
  };
  const show = event => {
    const box = area.getBoundingClientRect();
    const x = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1) * 1000;
    const values = lines.map(line => at(line.points, x));
    const digits = {maximumFractionDigits: xMax > 9 ? 0 : 1};
    const rows = [["", (x / 1000 * xMax).toLocaleString("en", digits)]];
    lines.forEach((line, i) => {
      const below = line.stacked && lines[i + 1] && lines[i + 1].stacked ? values[i + 1] : 0;
      const value = values[i] - below;
      if (!isNaN(value)) rows.push([line.name, (+value.toPrecision(4)).toLocaleString("en",
        {maximumSignificantDigits: 4})]);
    });
    tip.replaceChildren(...rows.map(words => {
      const row = document.createElement("div");
      row.append(...words.map(word => {
        const span = document.createElement("span"); span.textContent = word; return span;
      }));
      return row;
    }));
    rule.hidden = tip.hidden = false;
    rule.style.left = x / 10 + "%";
    tip.style.left = x > 500 ? "auto" : `calc(${x / 10}% + 10px)`;
    tip.style.right = x > 500 ? `calc(${100 - x / 10}% + 10px)` : "auto";
  };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", () => { rule.hidden = tip.hidden = true; });
}
"""
