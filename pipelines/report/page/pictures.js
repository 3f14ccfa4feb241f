
// Pictures enlarge: a click or Enter opens one with its path, the arrow keys go to the next, Esc closes it.
function addPictures() {
  const shown = [...document.querySelectorAll(".gallery img")];
  let at = 0, dialog = null, parts = null;
  const show = (next) => {
    at = (next + shown.length) % shown.length;
    const from = shown[at], item = from.closest("li");
    parts.image.src = from.src;
    parts.image.alt = from.alt;
    parts.title.replaceChildren(make("bdi", {}, item.querySelector(".name").textContent));
    parts.lines.replaceChildren(...[...item.querySelectorAll("dl > div")].map((line) => line.cloneNode(true)));
    parts.path.replaceChildren(...(from.dataset.path ? ["File: ", make("code", {}, from.dataset.path)] : []));
    parts.place.textContent = `${at + 1} of ${shown.length}`;
  };
  // Made for the first picture: an image without a source is none.
  const build = () => {
    parts = { image: make("img"), title: make("h2", { id: "enlarged" }), lines: make("dl"), path: make("p", { className: "path" }), place: make("span") };
    const step = (text, name, by) => {
      const button = make("button", { type: "button" }, text);
      button.setAttribute("aria-label", name);
      button.addEventListener("click", () => show(at + by));
      return button;
    };
    const close = make("button", { type: "button" }, "Close");
    dialog = make("dialog", { className: "enlarged" },
      make("div", { className: "tools" }, step("‹", "Picture before", -1), step("›", "Next picture", 1), close, parts.place),
      parts.title, parts.image, parts.lines, parts.path);
    dialog.setAttribute("aria-labelledby", "enlarged");
    close.addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight") show(at + 1);
      else if (event.key === "ArrowLeft") show(at - 1);
    });
    document.body.append(dialog);
  };
  shown.forEach((picture, number) => {
    const button = make("button", { type: "button", className: "enlarge", title: "Enlarge" });
    picture.replaceWith(button);
    button.append(picture);
    button.addEventListener("click", () => {
      if (!dialog) build();
      show(number);
      dialog.showModal();
    });
  });
}
