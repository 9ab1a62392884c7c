"use strict";
// Draws the figures: resolves colours for the scheme in use, turns paired surfaces together, and prepares for print.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")]; // in the order of the figures
  const root = document.documentElement;
  const config = { displaylogo: false, responsive: true, scrollZoom: false, displayModeBar: false };
  const hasWebGL = (() => {
    try {
      return Boolean(document.createElement("canvas").getContext("webgl"));
    } catch {
      return false;
    }
  })();

  const resolve = (value, style) => {
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map((item) => resolve(item, style));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, style)]));
    const name = typeof value === "string" && /^var\((--[a-z]+)\)$/.exec(value);
    return name ? style.getPropertyValue(name[1]).trim() : value;
  };

  // Without WebGL a surface is seen from above.
  const flatten = ({ data: [surface], layout: { scene, ...layout } }) => ({
    data: [{ ...surface, type: "heatmap", zmin: surface.cmin, zmax: surface.cmax, cmin: undefined, cmax: undefined }],
    layout: {
      ...layout,
      margin: { l: 56, r: 12, t: 12, b: 44 },
      xaxis: { title: { text: scene.xaxis.title.text } },
      yaxis: { title: { text: scene.yaxis.title.text } },
    },
  });

  if (!hasWebGL) figures.forEach((figure, number) => figure.layout.scene && (figures[number] = flatten(figure)));

  const draw = () => {
    const style = getComputedStyle(root);
    plots.forEach((plot, number) => {
      const { data, layout } = resolve(figures[number], style);
      const { eye } = layout.scene?.camera ?? {};
      if (eye && plot.clientWidth < 420) for (const axis of "xyz") eye[axis] *= 1.25; // step back on a phone
      if (eye && plot.layout) layout.scene.camera = plot.layout.scene.camera; // as the reader has turned it
      if (root.dataset.scheme) layout.width = plot.clientWidth; // that of the paper
      Plotly.react(plot, data, layout, config);
      if (eye) follow(plot);
    });
  };

  // A wheel over a surface scrolls the page: Plotly would swallow it.
  for (const plot of plots) plot.addEventListener("wheel", (event) => event.stopPropagation(), { capture: true, passive: true });

  const follow = (plot) => {
    const partners = plots.filter((other) => other !== plot && other.dataset.pair === plot.dataset.pair);
    const turn = (event) => {
      const camera = event && event["scene.camera"];
      if (!camera || plot.following) return;
      for (const partner of partners) {
        if (!partner.layout) continue;
        partner.following = true;
        Plotly.relayout(partner, { "scene.camera": camera }).finally(() => (partner.following = false));
      }
    };
    plot.removeAllListeners("plotly_relayout");
    plot.removeAllListeners("plotly_relayouting");
    plot.on("plotly_relayout", turn);
    plot.on("plotly_relayouting", turn);
  };

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", () => {
    root.dataset.scheme = "light";
    for (const details of document.querySelectorAll("details")) details.open = true;
    draw();
  });
  addEventListener("afterprint", () => {
    delete root.dataset.scheme;
    draw();
    for (const plot of plots) Plotly.Plots.resize(plot);
  });
})();
