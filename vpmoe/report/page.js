// Draws the figures of the page, in the colours of its light or dark style.
"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const narrow = window.matchMedia("(max-width: 600px)");

function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function axis(given) {
  return { gridcolor: style("--grid"), zerolinecolor: style("--grid"), linecolor: style("--grid"), automargin: true, ...given };
}

function layout(figure) {
  const text = style("--text");
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: style("--font"), size: 12, color: text },
    margin: { l: 8, r: 8, t: 30, b: 8 },
    hovermode: "closest",
    hoverlabel: { bgcolor: style("--card"), bordercolor: style("--grid"), font: { color: text } },
    showlegend: true,
    legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
    dragmode: narrow.matches ? false : "zoom", // on a phone a finger scrolls the page
    ...figure.layout,
    xaxis: axis(figure.layout.xaxis),
    yaxis: axis(figure.layout.yaxis),
  };
}

function draw() {
  for (const figure of figures) {
    Plotly.react(figure.id, figure.traces, layout(figure), { responsive: true, displayModeBar: false });
  }
}

draw();
dark.addEventListener("change", draw);
