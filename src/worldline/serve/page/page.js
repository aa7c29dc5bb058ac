// The page of `worldline serve`: it uses the public routes alone and keeps no state of its own.
// What a client or a server wrote reaches the document as textContent, never as HTML.

const PAGE = 20; // videos of a page of the list
const MOST_UNDER_WAY = 300; // that are listed without being asked for: the oldest is made first
const SEEDS = 2 ** 32;
const ENDED = new Set(["completed", "failed", "cancelled"]);
const STATUS = {
  queued: "Waiting", in_progress: "Working", completed: "Done", failed: "Failed", cancelled: "Cancelled",
};
const STEPS = {
  guardrail: "checking by the guardrails", upsample: "rewriting the prompt", text: "reading the prompt",
  encode: "reading the input", tokens: "drawing tokens", denoise: "denoising", decode: "decoding frames",
  done: "writing the file",
};
const LABELS = {
  num_video_frames: "Frames", num_steps: "Steps", guidance: "Guidance", fps: "Frames per second",
  num_input_frames: "Input frames used", negative_prompt: "Negative prompt", top_p: "Top-p",
  fit: "Fit of the input", input_reference: "Start from", lossless: "Lossless copy",
};
// help in place of the interface's own
const HINTS = {
  lossless: "Keep the frames bit for bit, too, in a second file.",
  rollout: "How a video longer than the model's own is made: from the last tokens, or from the last frames, encoded again.",
};
const IMAGES = ["image/png", "image/jpeg", "image/webp"]; // a GIF is a video
const MAIN = ["num_video_frames", "num_steps"]; // fields that are not folded
// made elsewhere on the page, or files of the server's machine
const SPECIAL = new Set(["prompt", "seed", "model", "width", "height", "preview_every", "input_reference"]);
// field -> where defaults of a world have it, if under another name
const DEFAULT_NAMES = { num_video_frames: "num_frames" };
// param of an error -> place of its words
const PLACES = {
  width: "size", height: "size", num_frames: "num_video_frames", frames: "num_video_frames",
  seconds: "num_video_frames", steps: "num_steps", num_inference_steps: "num_steps",
  guidance_scale: "guidance", video: "input_reference", input: "input_reference",
};
const EXAMPLES = {
  tiny: "A red ball rolls to the right along the floor, with a blue box.",
  other: "A forklift carries a pallet down a bright warehouse aisle while a worker steps aside; the camera follows at walking pace.",
};

// The document

const hook = (name, root = document) => root.querySelector(`[data-testid="${name}"]`);
const part = (name, root) => root.querySelector(`[data-part="${name}"]`);

function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "dataset") Object.assign(node.dataset, value);
    else if (name in node && !name.startsWith("aria")) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function setRange(range, value, most) {
  range.max = most;
  range.value = value;
  range.style.setProperty("--fill", `${most ? (100 * value) / most : 0}%`);
}

function setIcon(button, icon, label) {
  button.querySelector("use").setAttribute("href", `#${icon}`);
  button.setAttribute("aria-label", label);
}

// Not `disabled`, which would lose the focus of the keyboard.
function setBusy(button, on) {
  button.setAttribute("aria-disabled", String(on));
}

function announce(text) {
  hook("live").textContent = text;
}

let toastTimer = 0;

// Heard and seen, for what changes out of sight.
function toast(text) {
  clearTimeout(toastTimer);
  announce(text);
  hook("live").classList.add("toast");
  toastTimer = setTimeout(() => hook("live").classList.remove("toast"), 4000);
}

let trouble = "";
let lost = false; // whether the server does not answer

function showTrouble(text) {
  trouble = text;
  const words = lost ? "Reconnecting … The server does not answer; what is typed here stays." : trouble;
  setText(hook("trouble"), words);
  hook("trouble").hidden = !words;
}

function setLost(on) {
  if (lost === on) return;
  lost = on;
  document.body.classList.toggle("lost", on);
  if (!on) hook("form-error").hidden = true;
  showTrouble(trouble);
  runs.forEach(showLeft);
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const still = matchMedia("(prefers-reduced-motion: reduce)");
const scrollTo = (node, block) => node.scrollIntoView({ block, behavior: still.matches ? "auto" : "smooth" });
const number = (value) => Number(value).toLocaleString("en", { maximumFractionDigits: 4, useGrouping: false });

function duration(seconds) {
  if (seconds < 1) return "a second";
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

function since(time) {
  const seconds = Date.now() / 1000 - time;
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
  return new Date(time * 1000).toLocaleDateString(undefined, { day: "numeric", month: "short" });
}

// The server

class Refusal extends Error {
  constructor(status, { message, code = null, param = null }) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

async function refusal(response) {
  try {
    const { error } = await response.json();
    if (error?.message) return new Refusal(response.status, error);
  } catch {
    // no JSON: a proxy answered
  }
  return new Refusal(response.status, { message: `The server answered ${response.status} ${response.statusText}.` });
}

const KEY = "worldline key";
let keyAsked = null; // one question for all requests that wait

async function call(path, { method = "GET", json, form, headers = {}, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    let response;
    try {
      response = await fetch(path, {
        method, signal, cache: method === "GET" ? "no-cache" : "default",
        body: form ?? (json === undefined ? undefined : JSON.stringify(json)),
        headers: {
          ...headers,
          ...(json === undefined ? {} : { "Content-Type": "application/json" }),
          ...(key ? { Authorization: `Bearer ${key}` } : {}),
        },
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      if (hook("connection").dataset.state !== "live") setLost(true); // a file that cannot be read fails, too
      throw new Refusal(0, { message: "The server does not answer; is it running?", code: "unreachable" });
    }
    setLost(false);
    if (response.status === 401) {
      if (key === sessionStorage.getItem(KEY)) {
        keyAsked ??= askKey(key ? "The server does not know this key; check it." : "").finally(() => { keyAsked = null; });
        await keyAsked;
      }
      continue;
    }
    if (!response.ok) throw await refusal(response);
    hook("forget-key").hidden = !key;
    return response;
  }
}

const read = async (path, options) => (await call(path, options)).json();

function askKey(message) {
  const dialog = hook("key-dialog"), input = hook("key-input"), problem = hook("key-error");
  sessionStorage.removeItem(KEY);
  setText(problem, message);
  problem.hidden = !message;
  input.setAttribute("aria-invalid", String(Boolean(message)));
  input.value = "";
  if (!dialog.open) dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    hook("key-form").onsubmit = (event) => {
      event.preventDefault();
      const key = input.value.trim();
      // a header holds these alone; fetch would throw
      if (!/^[\x21-\x7e]+$/.test(key)) {
        setText(problem, key ? "A key has Latin letters, digits and signs, without spaces." : "Give the key of this server.");
        problem.hidden = false;
        return;
      }
      sessionStorage.setItem(KEY, key);
      dialog.close();
      resolve();
    };
  });
}

// random, and not crypto.randomUUID, which plain http lacks
const randomHex = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

// A POST whose connection broke is sent again under the same key: never two videos of one click.
async function submit(path, body) {
  const headers = { "Idempotency-Key": randomHex() };
  for (let attempt = 0; ; attempt += 1) {
    try {
      return await read(path, { method: "POST", headers, ...body });
    } catch (error) {
      if (error.code !== "unreachable" || attempt === 2) throw error;
      await pause(400 * 2 ** attempt);
    }
  }
}

async function fetchBlob(path) {
  return (await call(path)).blob();
}

async function saveFile(path, name) {
  const url = URL.createObjectURL(await fetchBlob(path));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

const pathOf = (id, rest = "") => `v1/videos/${encodeURIComponent(id)}${rest}`;

// Worlds and the form

let worlds = [];
let world = null; // the chosen entry of /v1/models
let busy = false; // while a request is sent
let source = null; // {file} | {input_of} | {video}: what is continued; with url, kind, name
const inputs = new Map(); // field -> {control, schema, default, auto}

const factsOf = (entry) => entry?.worldline ?? {};
const isLoaded = (entry) => Boolean(factsOf(entry).fields);
const takesText = (entry) => isLoaded(entry) && Boolean(factsOf(entry).fields.prompt && factsOf(entry).inputs?.includes("none"));

function plainSchema(schema) {
  const kinds = (schema.anyOf ?? schema.oneOf ?? []).filter((each) => each.type !== "null");
  const type = Array.isArray(schema.type) ? schema.type.find((each) => each !== "null") : schema.type;
  if (kinds.length === 1) return { ...schema, ...kinds[0] };
  return { ...schema, type: kinds.length ? "string" : type ?? (schema.enum ? "string" : undefined) };
}

function labelOf(name) {
  const words = name.replaceAll("_", " ");
  return LABELS[name] ?? words[0].toUpperCase() + words.slice(1);
}

let worldsTimer = 0;

async function loadWorlds() {
  clearTimeout(worldsTimer);
  try {
    worlds = (await read("v1/models")).data;
    showTrouble("");
  } catch (error) {
    if (!lost) showTrouble(error.message);
    worldsTimer = setTimeout(loadWorlds, 3000);
    return;
  }
  const select = hook("world"), chosen = sessionStorage.getItem("world"), shown = select.value;
  const ids = worlds.map(({ id }) => id), filled = source || Object.keys(changedFields()).length;
  if (ids.join() !== [...select.options].map(({ value }) => value).join()) {
    select.replaceChildren(...ids.map((id) => element("option", { value: id, textContent: id })));
  }
  if (ids.includes(chosen)) select.value = chosen;
  else if (filled && ids.includes(shown)) select.value = shown;
  else select.value = (worlds.find(takesText) ?? worlds.find(isLoaded) ?? worlds[0])?.id;
  const entry = worlds.find(({ id }) => id === select.value);
  const again = entry?.id === world?.id && isLoaded(world) && !isLoaded(entry); // the form stays as it is filled
  if (entry && !again && JSON.stringify([entry.id, entry.worldline]) !== JSON.stringify([world?.id, world?.worldline])) chooseWorld(entry);
  if (entry) showState(entry);
  for (const run of runs.values()) render(run);
  if (!worlds.length || !worlds.every(isLoaded)) worldsTimer = setTimeout(loadWorlds, 2000);
}

function showState(entry) {
  const { inputs: kinds = [], fields, guardrails } = factsOf(entry);
  const takes = kinds.map((kind) => ({ none: "text", image: "an image", video: "a clip" })[kind]);
  hook("generate").disabled = !isLoaded(entry);
  setText(hook("world-facts"), isLoaded(entry)
    ? `Starts from ${takes.filter((kind) => kind !== "text" || fields.prompt).join(", ").replace(/, ([^,]*)$/, " or $1")} · guardrails ${guardrails ? "on" : "off"}`
    : "This world is being loaded; it takes requests as soon as it is ready.");
}

// What a person chose stays, whatever else is loaded.
function pickWorld(id) {
  hook("world").value = id;
  sessionStorage.setItem("world", id);
  if (id !== world?.id) chooseWorld(worlds.find((entry) => entry.id === id));
}

function chooseWorld(entry) {
  const typed = changedFields(), facts = factsOf(entry);
  world = entry;
  showState(entry);
  const kinds = facts.inputs ?? [];
  const media = kinds.filter((kind) => kind !== "none");
  hook("input-field").hidden = !media.length;
  if (source && isLoaded(entry) && !media.length) setSource(null);
  hook("file").accept = media.flatMap((kind) => (kind === "image" ? IMAGES : ["video/*", "image/gif", ".mkv"])).join(",");
  setText(hook("input-need"), kinds.includes("none") ? "(optional)" : "(required)");
  setText(hook("prompt-need"), ["required", undefined].includes(facts.limits?.prompt) ? "" : "(optional)");
  setText(hook("drop-words"), `or drop ${media.map((kind) => ({ image: "an image", video: "a video" })[kind]).join(" or ")}`);
  hook("prompt-field").hidden = !facts.fields?.prompt;
  buildFields(facts);
  fillFields(typed);
  const tiny = entry.id.startsWith("tiny-"), draws = !facts.fields?.prompt;
  setText(hook("example-kind"), draws ? "Try it with a picture" : "Try this prompt");
  setText(hook("example-words"), draws ? "A ball on a table, drawn by this page." : EXAMPLES[tiny ? "tiny" : "other"]);
  hook("example").hidden = !isLoaded(entry);
  hook("example-small").hidden = draws;
  clearProblems();
}

function buildFields(facts) {
  const main = hook("main-fields"), advanced = hook("advanced-fields");
  inputs.clear();
  main.replaceChildren();
  advanced.replaceChildren();
  const fields = facts.fields ?? {};
  const names = Object.keys(fields).filter((name) => !SPECIAL.has(name));
  for (const name of [...MAIN.filter((each) => names.includes(each)), ...names.filter((each) => !MAIN.includes(each))]) {
    const schema = plainSchema(fields[name]);
    if (!["integer", "number", "string", "boolean"].includes(schema.type)) continue; // files of embeddings
    (MAIN.includes(name) ? main : advanced).append(buildField(name, schema, facts));
  }
  if (fields.width && fields.height) main.append(buildSize(fields, facts));
  if (facts.previews && fields.preview_every) advanced.append(buildPreview());
  hook("advanced").hidden = !advanced.childElementCount;
  showLength();
}

function defaultOf(name, schema, facts) {
  if (/\[default:/.test(schema.description ?? "")) return null; // it depends: the world's to choose
  return schema.default ?? facts.defaults?.[name] ?? facts.defaults?.[DEFAULT_NAMES[name]] ?? null;
}

function problemOf(name) {
  return element("p", { className: "problem", id: `error-${name}`, role: "alert", hidden: true, dataset: { testid: `error-${name}` } });
}

function register(name, control, schema, facts, auto) {
  const preset = defaultOf(name, schema, facts);
  control.id = `field-${name}`;
  control.dataset.testid = `field-${name}`;
  inputs.set(name, { control, schema, preset, auto });
  if (!control.hasAttribute("aria-describedby")) control.setAttribute("aria-describedby", `hint-${name} error-${name}`);
  setField(name, preset);
  control.addEventListener("input", () => {
    control.removeAttribute("aria-invalid");
    showLength();
    countChanged();
  });
}

function numberInput(schema) {
  const whole = schema.type === "integer";
  const input = element("input", { type: "number", step: whole ? "1" : "any", inputMode: whole ? "numeric" : "decimal" });
  if (schema.minimum !== undefined) input.min = schema.minimum;
  if (schema.maximum !== undefined) input.max = schema.maximum;
  return input;
}

// Names of the interface are labels of the page, formulas are their first numbers.
function plain(text) {
  return text
    .replace(/\b(\d+) \+ (\d+)k\b(, such as \d+)?\.?/g, (_, first, step) => series(Number(first), Number(step)))
    .replace(/(?<![\w'"-])-*([a-z]+(?:_[a-z]+)+)\b/g, (_, name) => `“${labelOf(name)}”`);
}

const series = (first, step) => `${first}, ${first + step}, ${first + 2 * step}, …`;

// Words of a field's help; its default is in the field.
function hintOf(name, { description = "" }, { limits = {}, fields = {} }) {
  if (name === "num_video_frames" && limits.frames_multiple > 1) {
    const most = limits.max_frames ? ` up to ${limits.max_frames}` : "";
    return `${series(limits.min_frames ?? 1, limits.frames_multiple)}${most}, with those of the input.${fields.chunk_size ? " With a chunk size, any number." : ""}`;
  }
  return HINTS[name] ?? plain(description.replace(/\s*\[default:\s*(.*?)\]/, " Automatic: $1.")).trim();
}

function buildField(name, schema, facts) {
  const auto = defaultOf(name, schema, facts) === null;
  let control, long = false;
  if (schema.type === "boolean") {
    control = element("input", { type: "checkbox" });
  } else if (schema.enum) {
    const choices = schema.enum.filter((choice) => choice !== null);
    control = element("select", {}, ...choices.map((choice) => element("option", { value: String(choice), textContent: String(choice).replaceAll("_", " ") })));
    if (auto) control.prepend(element("option", { value: "", textContent: "automatic" }));
  } else if (schema.type === "string") {
    long = (schema.maxLength ?? 0) > 1000 || String(schema.default ?? "").length > 60;
    control = long ? element("textarea", { rows: 3 }) : element("input", { type: "text", spellcheck: false });
  } else {
    control = numberInput(schema);
    const multiple = facts.limits?.frames_multiple;
    if (name === "num_video_frames" && multiple > 1) Object.assign(control, { min: facts.limits.min_frames ?? 1, step: multiple });
    if (name === "num_video_frames" && facts.limits?.max_frames) control.max = facts.limits.max_frames;
    const usual = facts.defaults?.[DEFAULT_NAMES[name] ?? name];
    if (auto) control.placeholder = name !== "num_input_frames" && usual != null ? number(usual) : "automatic";
  }
  register(name, control, schema, facts, auto);
  const hint = element("p", { className: "hint", id: `hint-${name}`, textContent: hintOf(name, schema, facts) });
  hint.hidden = !hint.textContent;
  const label = element("label", { htmlFor: control.id, textContent: labelOf(name) });
  const body = schema.type === "boolean" ? [element("label", { className: "check" }, control, element("span", { textContent: labelOf(name) }))] : [label, control];
  if (name === "num_video_frames") body.push(element("p", { className: "hint", dataset: { testid: "length" } }));
  if (MAIN.includes(name) && name === "num_video_frames") hint.classList.add("long");
  return element("div", { className: `field${long ? " long" : ""}`, dataset: { name } }, ...body, hint, problemOf(name));
}

function buildSize(fields, facts) {
  const controls = ["width", "height"].map((name) => {
    const schema = plainSchema(fields[name]), control = numberInput(schema);
    control.setAttribute("aria-label", `${labelOf(name)} in pixels`);
    control.setAttribute("aria-describedby", "error-size");
    if (facts.limits?.size_multiple) Object.assign(control, { min: facts.limits.size_multiple, step: facts.limits.size_multiple });
    if (facts.limits?.[`max_${name}`]) control.max = facts.limits[`max_${name}`];
    register(name, control, schema, facts, false);
    return control;
  });
  return element("div", { className: "field long", dataset: { name: "size" } },
    element("span", { className: "label", textContent: "Size" }),
    element("div", { className: "size" }, controls[0], element("span", { textContent: "×", "aria-hidden": "true" }), controls[1]),
    problemOf("size"));
}

function buildPreview() {
  const control = element("input", { type: "checkbox", checked: true, id: "previews", dataset: { testid: "previews" } });
  return element("div", { className: "field long", dataset: { name: "preview_every" } },
    element("label", { className: "check" }, control, element("span", { textContent: "Preview while it runs" })), problemOf("preview_every"));
}

function setField(name, value) {
  const { control, schema, preset, auto } = inputs.get(name);
  if (schema.type === "boolean") control.checked = Boolean(value ?? preset);
  else if (auto && (value === null || value === undefined || value === preset)) control.value = "";
  else control.value = String(value ?? preset ?? "");
}

// Value of a field where it is another than the world's own; what is not changed is not sent.
function changedValue(name) {
  const { control, schema, preset } = inputs.get(name);
  if (schema.type === "boolean") return control.checked === Boolean(preset) ? undefined : control.checked;
  if (control.validity?.badInput) return control.value; // refused before anything is sent
  const text = control.value;
  if (schema.type === "string" && !schema.enum) return text === String(preset ?? "") ? undefined : text;
  if (text.trim() === "") return undefined;
  const value = schema.type === "string" ? text : Number(text);
  return value === preset ? undefined : value;
}

function changedFields() {
  const changed = {};
  for (const name of inputs.keys()) {
    const value = changedValue(name);
    if (value !== undefined) changed[name] = value;
  }
  return changed;
}

function fillFields(values) {
  for (const name of inputs.keys()) setField(name, values[name]);
  countChanged();
  showLength();
}

function countChanged() {
  const folded = [...inputs].filter(([name, { control }]) => hook("advanced").contains(control) && changedValue(name) !== undefined);
  setText(hook("changed-count"), folded.length ? `${folded.length} changed` : "");
}

function showLength() {
  const place = hook("length");
  if (!place) return;
  const facts = factsOf(world), control = inputs.get("num_video_frames").control;
  const frames = Number(control.value || control.placeholder);
  const fps = Number(inputs.get("fps")?.control.value || facts.defaults?.fps || facts.fps);
  setText(place, frames > 0 && fps > 0 ? `${(frames / fps).toFixed(1)} s at ${number(fps)} frames a second` : "");
}

// Input of the form

async function setSource(next) {
  if (source?.url) URL.revokeObjectURL(source.url);
  source = next;
  if (inputs.has("num_input_frames")) setField("num_input_frames", null); // that of another input
  clearProblem("input_reference");
  const image = hook("input-image"), video = hook("input-video");
  hook("drop").hidden = Boolean(source);
  hook("source").hidden = !source;
  for (const node of [image, video]) {
    node.hidden = true;
    node.removeAttribute("src");
  }
  setText(hook("go-hint"), source?.video ? "Continues its last frames." : "");
  if (!source) return void (hook("file").value = "");
  setText(hook("source-name"), source.name);
  setText(hook("source-note"), source.note);
  const current = source;
  if (!current.file) {
    try {
      current.file = await fetchBlob(current.path);
    } catch (error) {
      return void (current === source && setText(hook("source-note"), error.message));
    }
  }
  if (current !== source) return;
  current.url = URL.createObjectURL(current.file);
  const node = current.file.type.startsWith("image/") ? image : video;
  node.onerror = () => {
    node.hidden = true;
    if (current !== source) return;
    if (node === image) refuseFile(`${current.name} cannot be read as an image`);
    else setText(hook("source-note"), "This browser cannot show it; the server may read it.");
  };
  node.src = current.url;
  node.hidden = false;
  if (node === video && !still.matches) node.play().catch(() => {});
}

function refuseFile(problem) {
  setSource(null);
  const kinds = { image: "a PNG, JPEG or WebP image", video: "a video" };
  const wanted = (factsOf(world).inputs ?? []).map((kind) => kinds[kind]).filter(Boolean).join(" or ");
  showProblem("input_reference", `${problem}; choose ${wanted}.`);
}

function useFile(file) {
  if (!file) return;
  if (hook("input-field").hidden) return toast("This world starts from text alone.");
  // a type that the browser does not know is the server's to judge
  const kind = IMAGES.includes(file.type) ? "image" : /^video\/|^image\/gif|^$/.test(file.type) ? "video" : "";
  if (!file.size) return refuseFile(`${file.name} is empty`);
  if (file.type && !factsOf(world).inputs?.includes(kind)) return refuseFile(`${file.name} is ${file.type}`);
  const size = file.size < 1e6 ? `${Math.max(1, Math.round(file.size / 1e3))} KB` : `${(file.size / 1e6).toFixed(1)} MB`;
  setSource({ upload: true, file, name: file.name, note: size });
}

// A picture for worlds that start from one, so that the first video needs no file of the user's.
async function drawPicture() {
  const { width = 1024, height = 640 } = factsOf(world).defaults ?? {};
  const canvas = element("canvas", { width, height }), pen = canvas.getContext("2d");
  const disc = (x, y, radius, colour) => {
    pen.fillStyle = colour;
    pen.beginPath();
    pen.arc(x * width, y * height, radius * height, 0, 7);
    pen.fill();
  };
  pen.fillStyle = "#c9b28f";
  pen.fillRect(0, 0, width, height);
  disc(0.32, 0.585, 0.15, "rgb(60 40 20 / 25%)");
  disc(0.31, 0.55, 0.15, "#e0b020");
  pen.fillStyle = "#3d6fb6";
  pen.fillRect(0.62 * width, 0.42 * height, 0.26 * height, 0.26 * height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  useFile(new File([blob], "ball.png", { type: "image/png" }));
}

async function useExample() {
  if (factsOf(world).fields?.prompt) hook("prompt").value = EXAMPLES[world.id.startsWith("tiny-") ? "tiny" : "other"];
  if (!(factsOf(world).inputs ?? ["none"]).includes("none") && !source) await drawPicture();
  saveDraft();
  clearProblems();
  hook("generate").focus();
  scrollTo(hook("generate"), "center");
}

const saveDraft = () => sessionStorage.setItem("prompt", hook("prompt").value);

// Problems, in words, at their field

function placeOf(param) {
  const name = String(param ?? "").split(/[.[]/)[0], place = PLACES[name] ?? name;
  return document.getElementById(`error-${place}`) ? place : null;
}

function controlOf(place) {
  const field = document.getElementById(`error-${place}`).closest(".field");
  return field.querySelector("input:not([hidden]), select, textarea");
}

// A message of the server, led by the label of its field.
function problemWords(param, message, value) {
  if (!param) return plain(message);
  const name = String(param).split(/[.[]/)[0], label = labelOf(PLACES[name] === "size" ? name : PLACES[name] ?? name);
  const nearest = message.match(/the nearest is (\d+)/)?.[1];
  if (nearest && value) return `${label}: ${value} is not possible; the nearest is ${nearest}.`;
  const own = message.startsWith(name) && /^\W/.test(message.slice(name.length));
  return label + plain(own ? message.slice(name.length) : `: ${message}`);
}

// The valid number nearest to that of a control; null where its limits do not give one.
function nearestOf(control, message) {
  if (control.type !== "number" || !control.value) return null;
  const stated = message.match(/the nearest is (\d+)/)?.[1], value = Number(control.value);
  if (stated) return Number(stated);
  const bound = (text, other) => (text === "" ? other : Number(text));
  const least = bound(control.min, -Infinity), most = bound(control.max, Infinity);
  const [first, step] = (message.match(/(\d+) \+ (\d+)k/)?.slice(1) ?? [control.min, control.step]).map((text) => Number(text) || 0);
  let near = Math.min(most, Math.max(least, value));
  if (step) near = first + step * Math.round((near - first) / step);
  if (near > most) near -= step;
  return near === value ? null : near;
}

function showProblem(param, message) {
  const place = placeOf(param);
  const node = place ? document.getElementById(`error-${place}`) : hook("form-error");
  if (!place || node.closest(".field").hidden) {
    setText(hook("form-error"), problemWords(param, message));
    hook("form-error").hidden = false;
    return hook("form-error").scrollIntoView({ block: "nearest" });
  }
  const control = inputs.get(param)?.control ?? controlOf(place), near = nearestOf(control, message);
  setText(node, problemWords(param, message, control.value));
  node.hidden = false;
  if (near !== null) {
    const use = element("button", { type: "button", className: "link", textContent: `Use ${number(near)}`, dataset: { testid: `use-${place}` } });
    use.onclick = () => {
      control.value = near;
      control.dispatchEvent(new Event("input", { bubbles: true }));
      control.focus();
    };
    node.append(" ", use);
  }
  node.closest("details")?.setAttribute("open", "");
  control.setAttribute("aria-invalid", "true");
  control.focus();
}

function clearProblem(place) {
  const node = document.getElementById(`error-${place}`);
  node.hidden = true;
  for (const control of node.closest(".field").querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
}

function clearProblems() {
  hook("form-error").hidden = true;
  for (const node of document.querySelectorAll("form[data-testid=form] .problem:not(.box)")) clearProblem(node.id.slice(6));
}

function badNumber() {
  for (const [name, { control }] of [...inputs, ["seed", { control: hook("seed") }]]) {
    if (control.validity?.badInput) {
      showProblem(name, "this is no number.");
      return true;
    }
  }
  return false;
}

// Asking for videos

function requestBody(seed) {
  const body = { model: world.id, ...changedFields() };
  if (factsOf(world).fields?.prompt && hook("prompt").value.trim()) body.prompt = hook("prompt").value.trim();
  if (seed !== undefined) body.seed = seed;
  if (hook("previews")?.checked) {
    const steps = Number(inputs.get("num_steps")?.control.value) || 1;
    body.preview_every = Math.max(1, Math.round(steps / 12));
  }
  return body;
}

function create(body, first) {
  if (source?.video) return submit("v1/videos/extensions", { json: { ...body, video: { id: source.video } } });
  if (source?.input_of) return submit("v1/videos", { json: { ...body, input_reference: { input_of: source.input_of } } });
  if (!source) return submit("v1/videos", { json: body });
  // the file of the first of several videos is not sent again
  if (first) return submit("v1/videos", { json: { ...body, input_reference: { input_of: first } } });
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) form.append(name, String(value));
  form.append("input_reference", source.file, source.name);
  return submit("v1/videos", { form });
}

async function generate(event) {
  event.preventDefault();
  const button = hook("generate");
  if (busy || button.disabled || !world) return;
  clearProblems();
  if (badNumber()) return;
  const text = hook("seed").value.trim(), many = hook("four-seeds").checked ? 4 : 1;
  const seed = text === "" ? randomSeed() : Number(text);
  setBusy(button, busy = true);
  setText(button, source?.upload ? "Uploading" : "Sending");
  try {
    let first;
    for (let index = many - 1; index >= 0; index -= 1) { // the newest is listed first
      const video = await create(requestBody(index ? (seed + index) % SEEDS : seed), first);
      first ??= video.id;
      put(video);
    }
    if (!hook("keep").checked) hook("seed").value = randomSeed();
    announce(many > 1 ? "4 videos are queued." : "The video is queued.");
    scrollTo(hook("runs").firstElementChild, innerWidth < 1000 ? "start" : "nearest");
  } catch (error) {
    showProblem(error.param, error.message);
  } finally {
    setText(button, "Generate");
    setBusy(button, busy = false);
  }
}

function worldOf(video) {
  return worlds.find(({ id }) => id === video.model);
}

async function useSettings(video) {
  const entry = worldOf(video);
  if (!entry) return void showProblem("model", `${video.model} is not on this server now.`);
  pickWorld(entry.id);
  const request = video.request ?? {}, origin = request.input_reference?.input_of;
  const loaded = setSource(origin ? { input_of: origin, path: pathOf(origin, "/content?variant=input"), name: "Input of an earlier video", note: "used again" } : null);
  fillFields(origin ? request : { ...request, num_input_frames: null });
  hook("prompt").value = request.prompt ?? video.prompt ?? "";
  saveDraft();
  if (hook("previews")) hook("previews").checked = request.preview_every !== 0;
  clearProblems();
  await loaded;
  toast("The form has the settings of this video, and another seed.");
}

function sameSeed(video) {
  hook("seed").value = video.seed ?? video.request?.seed;
  hook("keep").checked = true;
  toast(`The form has seed ${hook("seed").value} and keeps it.`);
}

function showComposer() {
  scrollTo(hook("form"), innerWidth < 1000 ? "start" : "nearest");
}

async function continueVideo(video) {
  if (worldOf(video)) pickWorld(video.model);
  hook("prompt").value ||= video.prompt ?? "";
  clearProblems();
  showComposer();
  await setSource({ video: video.id, path: pathOf(video.id, "/content"), name: "Continues this video", note: video.prompt ?? "" });
  (hook("prompt-field").hidden ? hook("generate") : hook("prompt")).focus({ preventScroll: true });
}

function remix(video) {
  const dialog = hook("remix-dialog"), text = hook("remix-prompt"), problem = hook("remix-error"), button = hook("remix-submit");
  text.value = video.prompt ?? "";
  problem.hidden = true;
  setBusy(button, false);
  dialog.showModal();
  hook("remix-form").onsubmit = async (event) => {
    event.preventDefault();
    if (button.getAttribute("aria-disabled") === "true") return;
    setBusy(button, true);
    problem.hidden = true;
    try {
      put(await submit(pathOf(video.id, "/remix"), { json: { prompt: text.value.trim() } }));
      dialog.close();
      scrollTo(hook("runs").firstElementChild, "nearest");
      announce("The remix is queued.");
    } catch (error) {
      setText(problem, problemWords(error.param, error.message));
      problem.hidden = false;
    } finally {
      setBusy(button, false);
    }
  };
}

// The list of videos

const runs = new Map(); // id -> {id, video, card, preview, etaAt, addedAt}
const picked = new Set(); // ids that are compared
let hasMore = false;

function put(video) {
  let run = runs.get(video.id);
  if (!run) {
    run = { id: video.id, addedAt: performance.now() };
    run.card = makeCard(run);
    runs.set(video.id, run);
    const list = hook("runs"), after = [...list.children].find((card) => card.dataset.id < video.id);
    list.insertBefore(run.card, after ?? null);
  } else if (ENDED.has(run.video.status) && !ENDED.has(video.status)) {
    return; // a list that was read before the end came
  }
  const before = run.video?.status;
  run.video = video;
  run.etaAt = video.eta_s == null ? null : Date.now() + video.eta_s * 1000;
  render(run);
  if (before && before !== video.status && ENDED.has(video.status)) announceEnd(video);
  showCounts();
}

function announceEnd({ status, prompt, error }) {
  const subject = prompt ? `: ${prompt.slice(0, 80)}` : "";
  announce(status === "failed" ? `A video failed: ${error?.message ?? ""}` : `A video is ${status === "completed" ? "done" : "cancelled"}${subject}`);
}

function drop(id) {
  const run = runs.get(id);
  if (!run) return;
  const next = run.card.nextElementSibling ?? run.card.previousElementSibling;
  if (run.card.contains(document.activeElement)) (next ?? document.getElementById("runs")).focus();
  run.card.remove();
  watcher.unobserve(run.card);
  if (run.url) URL.revokeObjectURL(run.url);
  runs.delete(id);
  picked.delete(id);
  showTray();
  showCounts();
}

function showCounts() {
  const active = [...runs.values()].filter(({ video }) => !ENDED.has(video.status)).length;
  setText(hook("runs-count"), active ? `${active} under way` : "");
  hook("clear-cancelled").hidden = !cancelled().length;
  hook("empty").hidden = runs.size > 0 || !listed;
  hook("runs").hidden = !runs.size;
  hook("older").hidden = !hasMore;
  document.title = active ? `(${active}) Worldline` : "Worldline";
}

let listed = false;

// The list as the server has it: after a start, a lost connection, a hidden tab.
async function resync() {
  const started = performance.now(), wanted = Math.max(PAGE, runs.size), seen = new Set();
  const underWay = () => !ENDED.has(page.data.at(-1)?.status) && seen.size < MOST_UNDER_WAY;
  let after = "", page;
  do {
    page = await read(`v1/videos?order=desc&limit=${Math.max(PAGE, Math.min(100, wanted - seen.size))}${after}`);
    for (const video of page.data) {
      seen.add(video.id);
      put(video);
    }
    after = `&after=${encodeURIComponent(page.last_id)}`;
  } while (page.has_more && page.data.length && (seen.size < wanted || underWay()));
  hasMore = page.has_more;
  listed = true;
  for (const run of [...runs.values()]) if (!seen.has(run.id) && run.addedAt < started) drop(run.id);
  showCounts();
}

async function showOlder() {
  const button = hook("older"), last = [...runs.keys()].sort()[0];
  button.disabled = true;
  try {
    const page = await read(`v1/videos?order=desc&limit=${PAGE}&after=${encodeURIComponent(last)}`);
    hasMore = page.has_more;
    page.data.forEach(put);
    runs.get(page.first_id)?.card.focus();
    showCounts();
  } catch (error) {
    showTrouble(error.message);
  } finally {
    button.disabled = false;
  }
}

let resyncTimer = 0;
function resyncSoon() { // places in the queue move when another job ends
  clearTimeout(resyncTimer);
  resyncTimer = setTimeout(() => resync().catch(() => {}), 250);
}

function makeCard(run) {
  const card = document.getElementById("run").content.firstElementChild.cloneNode(true);
  card.dataset.id = run.id;
  const on = (name, action) => hook(name, card).addEventListener("click", () => act(run, action));
  on("cancel", async () => put(await read(pathOf(run.id, "/cancel"), { method: "POST" })));
  on("download", () => saveFile(pathOf(run.id, "/content"), `${run.id}${run.video.media_type === "image/jpeg" ? ".jpg" : ".mp4"}`));
  on("continue", () => continueVideo(run.video));
  on("use-settings", async () => {
    showComposer();
    await useSettings(run.video);
    if (hook("keep").checked) hook("keep").checked = false;
  });
  on("same-seed", () => sameSeed(run.video));
  on("remix", () => remix(run.video));
  on("report", () => showReport(run.video));
  on("copy-curl", () => copyText(curlOf(run.video), "The curl command is copied."));
  on("delete", () => removeRun(run));
  hook("compare-toggle", card).addEventListener("change", (event) => pick(run, event.target.checked));
  const menu = hook("menu", card);
  menu.addEventListener("click", (event) => { // before the action, so that a dialog gives the focus back
    const button = event.target.closest(".menu-items button");
    if (!button || button.dataset.testid === "delete") return;
    hook("menu-open", card).focus();
    menu.open = false;
  }, true);
  player(run, card);
  watcher.observe(card);
  return card;
}

async function act(run, action) {
  const problem = hook("run-error", run.card);
  try {
    await action();
    showTrouble("");
  } catch (error) {
    if (error.code === "video_not_found") return drop(run.id);
    setText(problem, error.message);
    problem.hidden = false;
  }
}

const tabs = "BroadcastChannel" in window ? new BroadcastChannel("worldline") : null;
tabs?.addEventListener("message", ({ data }) => drop(data.removed));

async function removeRun(run) {
  const button = hook("delete", run.card);
  if (!button.dataset.armed) {
    button.dataset.armed = "yes";
    setText(button, "Delete for good?");
    setTimeout(() => {
      delete button.dataset.armed;
      setText(button, "Delete");
    }, 5000);
    return;
  }
  await erase(run.id);
  toast("The video is deleted.");
}

async function erase(id) {
  await call(pathOf(id), { method: "DELETE" });
  drop(id);
  tabs?.postMessage({ removed: id });
}

const cancelled = () => [...runs.values()].filter(({ video }) => video.status === "cancelled");

async function clearCancelled() {
  document.getElementById("runs").focus({ preventScroll: true }); // the button goes
  for (const { id } of cancelled()) await erase(id);
  toast("The cancelled videos are removed.");
}

function ordinal(place) {
  return place === 0 ? "next in line" : `${place} before it`;
}

function render(run) {
  const { video, card } = run, { status } = video, ended = ENDED.has(status), done = status === "completed";
  card.dataset.status = status;
  if (video.width && video.height) card.querySelector(".stage").style.setProperty("--ratio", `${video.width} / ${video.height}`);
  setText(hook("run-status", card), done ? "" : STATUS[status] ?? status);
  const { kind, done: count, total } = video.step ?? {};
  setText(hook("run-step", card), status === "queued"
    ? video.queue_position == null ? "" : ordinal(video.queue_position)
    : status === "in_progress" && kind ? `${STEPS[kind] ?? kind}${total > 1 ? ` ${count} of ${total}` : ""}` : "");
  showLeft(run);
  const prompt = hook("run-prompt", card);
  setText(prompt, video.prompt || "Without a prompt");
  prompt.classList.toggle("none", !video.prompt);
  prompt.title = video.prompt ?? "";
  const bar = hook("run-bar", card), progress = Math.min(100, Math.max(0, video.progress ?? 0));
  bar.hidden = ended;
  bar.setAttribute("aria-valuenow", progress);
  bar.setAttribute("aria-label", "Progress");
  bar.firstElementChild.style.width = `${progress}%`;
  showFacts(run);
  const problem = hook("run-error", card);
  if (status === "failed") setText(problem, video.error ? problemWords(video.error.param, video.error.message) : "No reason is known.");
  problem.hidden = status !== "failed";
  hook("cancel", card).hidden = ended;
  hook("report", card).hidden = !done;
  part("pick", card).hidden = !done;
  const facts = factsOf(worldOf(video)), kinds = facts.inputs ?? [];
  hook("continue", card).hidden = !done || !(kinds.includes("video") || kinds.includes("image"));
  hook("remix", card).hidden = !ended || !facts.fields?.prompt || !video.prompt;
  hook("run-preview", card).alt = done ? "" : "Preview of the video";
  if (!ended) showStill(run, run.preview ?? run.inputFrame);
  else if (!done) showStill(run, null);
  card.classList.toggle("begins", !ended && !run.preview);
  loadMedia(run);
}

function showStill(run, url) {
  const image = hook("run-preview", run.card);
  if (url && image.getAttribute("src") !== url) image.src = url;
  image.hidden = !url;
}

function showLeft(run) {
  const { video, etaAt, card } = run;
  const seconds = etaAt === null ? null : (etaAt - Date.now()) / 1000;
  setText(hook("run-left", card), lost || ENDED.has(video.status) || seconds === null ? ""
    : seconds < 1 ? "nearly there" : `about ${duration(seconds)} left`);
}

function showFacts({ video, card }) {
  const facts = [];
  if (video.num_frames) facts.push(`${video.num_frames} frame${video.num_frames > 1 ? "s" : ""}`);
  if (video.width) facts.push(`${video.width} × ${video.height}`);
  if (video.seconds) facts.push(`${number(Number(video.seconds).toFixed(2))} s`);
  if (video.seed != null) facts.push(`seed ${video.seed}`);
  if (video.inference_time_s) facts.push(`made in ${duration(video.inference_time_s)}`);
  facts.push(since(video.created_at));
  if (worlds.length > 1) facts.push(video.model);
  // lines break between facts, not within them
  const spans = facts.map((fact, index) => element("span", { textContent: index < facts.length - 1 ? `${fact} ·` : fact }));
  const place = hook("run-facts", card);
  if (place.textContent !== spans.map((span) => span.textContent).join(" ")) {
    place.replaceChildren(...spans.flatMap((span, index) => (index ? [" ", span] : [span])));
  }
}

setInterval(() => runs.forEach((run) => !ENDED.has(run.video.status) && showLeft(run)), 1000);
setInterval(() => runs.forEach(showFacts), 30_000);

// A finished video

const visible = new Set(); // runs near the window
const watcher = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const run = runs.get(target.dataset.id);
    if (!run) continue;
    (isIntersecting ? visible.add(run) : visible.delete(run));
    const video = hook("video", target);
    if (isIntersecting) loadMedia(run);
    else if (run.url) video.pause();
  }
}, { rootMargin: "200px" });

let slots = 3; // a browser has six connections for a server: media leave some for the rest
const waiting = [];

async function fetchMedia(path) {
  if (slots) slots -= 1;
  else await new Promise((resolve) => waiting.push(resolve));
  try {
    return await fetchBlob(path);
  } finally {
    const next = waiting.shift();
    if (next) next();
    else slots += 1;
  }
}

// Until a preview comes, the last frame of the input stands for the video that continues it.
async function loadInput(run) {
  if (run.inputAsked || run.preview || !run.video.request?.input_reference) return;
  run.inputAsked = true;
  const blob = await fetchMedia(pathOf(run.id, "/content?variant=input")), url = URL.createObjectURL(blob);
  const video = blob.type.startsWith("video/"), media = element(video ? "video" : "img", video ? { muted: true, preload: "auto" } : {});
  const until = (event) => new Promise((resolve, reject) => {
    media.addEventListener(event, resolve, { once: true });
    media.addEventListener("error", reject, { once: true });
  });
  const loaded = until(video ? "loadeddata" : "load");
  media.src = url;
  await loaded;
  if (video) {
    const seeked = until("seeked");
    media.currentTime = Math.max(0, media.duration - 0.02);
    await seeked;
  }
  const width = media.videoWidth || media.naturalWidth, height = media.videoHeight || media.naturalHeight, scale = Math.min(1, 640 / width);
  const canvas = element("canvas", { width: Math.round(width * scale), height: Math.round(height * scale) });
  canvas.getContext("2d").drawImage(media, 0, 0, canvas.width, canvas.height);
  URL.revokeObjectURL(url);
  run.inputFrame = canvas.toDataURL("image/jpeg", 0.85);
  if (runs.has(run.id)) render(run);
}

async function loadMedia(run) {
  if (!run.video || !visible.has(run)) return;
  if (!ENDED.has(run.video.status)) return void loadInput(run).catch(() => {});
  if (run.video.status !== "completed") return;
  const video = hook("video", run.card);
  if (run.url) return void (run.paused || still.matches || video.play().catch(() => {}));
  if (run.loading) return;
  run.loading = true;
  if (!run.preview) loadThumbnail(run);
  try {
    const blob = await fetchMedia(pathOf(run.id, "/content"));
    if (!runs.has(run.id)) return;
    run.url = URL.createObjectURL(blob);
    if (blob.type.startsWith("image/")) return showStill(run, run.url);
    video.onloadeddata = () => {
      video.hidden = false;
      showStill(run, null);
      part("controls", run.card).hidden = false;
      run.showFrame();
      if (!still.matches && visible.has(run)) video.play().catch(() => {});
    };
    video.onerror = () => act(run, () => { throw new Error("This browser cannot play the video; download it."); });
    video.src = run.url;
    dropOldMedia();
  } catch (error) {
    await act(run, () => { throw error; });
  } finally {
    run.loading = false;
  }
}

async function loadThumbnail(run) { // at once, where the video is large
  const blob = await fetchMedia(pathOf(run.id, "/content?variant=thumbnail")).catch(() => null);
  if (!blob || run.url) return;
  const url = URL.createObjectURL(blob);
  hook("run-preview", run.card).addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
  showStill(run, url);
}

// Blobs of videos out of sight are given back, beyond some.
function dropOldMedia() {
  const hidden = [...runs.values()].filter((run) => run.url && !visible.has(run) && !picked.has(run.id));
  for (const run of hidden.slice(0, Math.max(0, hidden.length - 24))) {
    const video = hook("video", run.card);
    video.onerror = null;
    video.removeAttribute("src");
    video.load();
    video.hidden = true;
    URL.revokeObjectURL(run.url);
    run.url = null;
  }
}

const frameRate = (video) => Number(video.fps) || Number(video.num_frames) / Number(video.seconds) || 24;
const frameAt = (time, fps, frames) => Math.max(0, Math.min(frames - 1, Math.floor(time * fps + 0.01)));
const timeOf = (frame, fps) => (frame + 0.5) / fps; // its middle: a rounded start shows the frame before

function player(run, card) {
  const video = hook("video", card), scrub = hook("scrub", card), button = hook("play", card), label = hook("frame", card);
  const shape = () => ({ fps: frameRate(run.video), frames: run.video.num_frames || Math.round(video.duration * frameRate(run.video)) });
  run.showFrame = () => {
    const { fps, frames } = shape(), frame = frameAt(video.currentTime, fps, frames);
    setRange(scrub, frame, frames - 1);
    setText(label, `${frame + 1} / ${frames}`);
    scrub.setAttribute("aria-valuetext", `Frame ${frame + 1} of ${frames}`);
  };
  const follow = () => {
    run.showFrame();
    if (!video.paused) requestAnimationFrame(follow);
  };
  const seek = (frame) => {
    const { fps, frames } = shape();
    run.paused = true;
    video.pause();
    video.currentTime = timeOf((frame + frames) % frames, fps);
  };
  const toggle = () => {
    run.paused = !video.paused;
    if (video.paused) video.play().catch(() => {});
    else video.pause();
  };
  video.addEventListener("play", () => {
    setIcon(button, "pause", "Pause");
    follow();
  });
  video.addEventListener("pause", () => setIcon(button, "play", "Play"));
  video.addEventListener("seeked", run.showFrame);
  video.setAttribute("aria-label", "The video; arrow keys step a frame, space plays");
  button.onclick = toggle;
  video.onclick = toggle;
  scrub.oninput = () => seek(Number(scrub.value));
  hook("enlarge", card).onclick = () => (document.fullscreenElement ? document.exitFullscreen() : card.querySelector(".stage").requestFullscreen());
  video.addEventListener("keydown", (event) => {
    const { fps, frames } = shape(), frame = frameAt(video.currentTime, fps, frames);
    const target = { ArrowLeft: frame - 1, ArrowRight: frame + 1, Home: 0, End: frames - 1 }[event.key];
    if (target !== undefined) seek(target);
    else if (event.key === " " || event.key === "Enter") toggle();
    else return;
    event.preventDefault();
  });
}

// Report and curl

function curlOf(video) {
  const body = Object.fromEntries(Object.entries({ model: video.model, ...video.request }).filter(([, value]) => value !== null));
  const quoted = `'${JSON.stringify(body).replaceAll("'", "'\\''")}'`;
  const key = sessionStorage.getItem(KEY) ? ' \\\n  -H "Authorization: Bearer $WORLDLINE_API_KEY"' : "";
  return `curl ${new URL("v1/videos", document.baseURI)}${key} \\\n  -H "Content-Type: application/json" \\\n  -d ${quoted}`;
}

async function copyText(text, message) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // plain http of another machine has no clipboard
    const area = element("textarea", { value: text, className: "aloud" });
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(message);
}

function definitions(entries) {
  return element("dl", {}, ...entries.flatMap(([name, value]) => [
    element("dt", { textContent: name }),
    element("dd", { textContent: typeof value === "string" ? value : JSON.stringify(value) }),
  ]));
}

async function showReport(video) {
  const body = hook("report-body"), dialog = hook("report-dialog");
  const report = await read(pathOf(video.id, "/content?variant=report"));
  const versions = Object.fromEntries(["worldline", "torch", "python", "device", "dtype", "attention"].filter((name) => report[name]).map((name) => [name, report[name]]));
  const stages = Object.entries(video.stage_durations ?? {}), longest = Math.max(...stages.map(([, seconds]) => seconds), 1e-9);
  const section = (title, ...children) => element("section", {}, element("h3", { textContent: title }), ...children);
  const curl = element("pre", { textContent: curlOf(video), tabIndex: 0, dataset: { testid: "curl" } });
  const copy = element("button", { type: "button", className: "link", textContent: "Copy", dataset: { testid: "copy-report-curl" } });
  copy.onclick = async () => {
    await copyText(curl.textContent, "The curl command is copied.");
    setText(copy, "Copied");
  };
  const save = element("button", { type: "button", className: "link", textContent: "Download as JSON", dataset: { testid: "download-report" } });
  save.onclick = () => saveFile(pathOf(video.id, "/content?variant=report"), `${video.id}.json`);
  const request = Object.entries(video.request ?? {}).filter(([name, value]) => name !== "model" && value !== null && value !== "");
  body.replaceChildren(element("div", { className: "report" },
    section("Request", definitions([["id", video.id], ["model", video.model], ...request])),
    ...(stages.length ? [section("Time", element("div", { className: "stages" }, ...stages.map(([name, seconds]) => {
      const bar = element("i");
      bar.style.width = `${(100 * seconds) / longest}%`;
      return element("div", {}, element("span", { textContent: name }), bar, element("span", { textContent: `${seconds.toFixed(seconds < 10 ? 2 : 0)} s` }));
    })))] : []),
    ...(video.peak_memory_mb ? [section("Memory", definitions([["peak", `${Math.round(video.peak_memory_mb)} MB`]]))] : []),
    ...(Object.keys(versions).length ? [section("Versions", definitions(Object.entries(versions)))] : []),
    ...(report.frames_sha256 ? [section("Frames", definitions([["SHA-256", report.frames_sha256]]))] : []),
    section("The same by curl", curl, copy),
    element("details", {}, element("summary", { textContent: "Whole report" }), element("pre", { textContent: JSON.stringify(report, null, 1), tabIndex: 0, dataset: { testid: "report-json" } })),
    element("p", {}, save),
  ));
  dialog.showModal();
}

// Compare

function pick(run, on) {
  if (on && picked.size === 4) {
    hook("compare-toggle", run.card).checked = false;
    return toast("Four videos are compared at most.");
  }
  if (on) picked.add(run.id);
  else picked.delete(run.id);
  run.card.classList.toggle("picked", on);
  showTray();
}

function showTray() {
  hook("tray").hidden = !picked.size;
  document.body.classList.toggle("picking", picked.size > 0);
  setText(hook("tray-words"), picked.size === 1 ? "Pick one to three more" : `${picked.size} videos`);
  hook("compare-open").disabled = picked.size < 2;
}

function clearPicks() {
  for (const id of [...picked]) {
    const { card } = runs.get(id);
    hook("compare-toggle", card).checked = false;
    pick(runs.get(id), false);
  }
}

function differences(videos) {
  const flat = videos.map((video) => ({ model: video.model, ...video.request, seed: video.seed, prompt: video.prompt }));
  const names = [...new Set(flat.flatMap(Object.keys))].filter((name) => !["input_reference", "preview_every", "prompt", "model"].includes(name));
  const differ = names.filter((name) => new Set(flat.map((each) => JSON.stringify(each[name] ?? null))).size > 1);
  return flat.map((each) => differ.map((name) => `${labelOf(name).toLowerCase()} ${each[name] ?? "automatic"}`).join(" · "));
}

// Plays several videos in step: the longest leads, the others are slowed or hastened towards it.
class Together {
  constructor(tiles, fps, frames, report) {
    Object.assign(this, { tiles, fps, frames, report, playing: false, generation: 0 });
    this.leader = tiles.reduce((longest, tile) => (tile.duration > longest.duration ? tile : longest));
    this.leader.addEventListener("ended", () => this.playing && this.play(0));
  }

  async seek(time) {
    const generation = (this.generation += 1);
    await Promise.all(this.tiles.map((tile) => new Promise((resolve) => {
      tile.pause();
      tile.playbackRate = 1;
      const target = Math.min(time, Math.max(0, tile.duration - 0.5 / this.fps));
      if (Math.abs(tile.currentTime - target) < 1e-4) return resolve();
      tile.addEventListener("seeked", resolve, { once: true });
      setTimeout(resolve, 1500);
      tile.currentTime = target;
    })));
    this.report();
    return generation === this.generation;
  }

  async play(time = this.leader.currentTime) {
    this.playing = true;
    if (!(await this.seek(time)) || !this.playing) return;
    await Promise.all(this.tiles.map((tile) => tile.play().catch(() => {})));
    this.follow(this.generation);
  }

  follow(generation) {
    if (!this.playing || generation !== this.generation) return;
    const time = this.leader.currentTime;
    for (const tile of this.tiles) {
      if (tile === this.leader || tile.ended) continue;
      const drift = tile.currentTime - Math.min(time, tile.duration);
      if (Math.abs(drift) > 0.25) tile.currentTime = Math.min(time, tile.duration);
      tile.playbackRate = Math.abs(drift) < 0.004 ? 1 : Math.min(1.6, Math.max(0.5, 1 - 5 * drift));
    }
    this.report();
    requestAnimationFrame(() => this.follow(generation));
  }

  stop() {
    this.playing = false;
    this.generation += 1;
    this.tiles.forEach((tile) => tile.pause());
  }
}

// The number of columns with which the videos are largest.
const fitter = new ResizeObserver(([{ target }]) => {
  const figures = [...target.children], gap = 16;
  if (!figures.length) return;
  target.style.removeProperty("--wide");
  const { width, height } = target.getBoundingClientRect();
  const ratio = Math.max(...figures.map(({ firstChild }) => Number(firstChild.style.getPropertyValue("--ratio"))));
  const words = 7 + Math.max(...figures.map(({ lastChild }) => lastChild.offsetHeight));
  const fits = figures.map((_, index) => {
    const columns = index + 1, rows = Math.ceil(figures.length / columns), tall = (height - gap * (rows - 1)) / rows - words;
    return { columns, tall, wide: Math.min((width - gap * index) / columns, tall * ratio) };
  });
  const best = fits.reduce((most, next) => (next.wide > most.wide ? next : most), { columns: 1, tall: 0, wide: 0 });
  target.style.setProperty("--columns", best.columns);
  for (const name of ["tall", "wide"]) target.style.setProperty(`--${name}`, `${best[name]}px`);
});
fitter.observe(hook("tiles"));

async function compare() {
  const chosen = [...picked].map((id) => runs.get(id)), videos = chosen.map(({ video }) => video);
  const dialog = hook("compare"), tiles = hook("tiles"), scrub = hook("compare-scrub"), button = hook("compare-play"), label = hook("compare-frame");
  const urls = [];
  const tile = async (path, name, prompt, detail) => {
    const blob = await fetchBlob(path), url = URL.createObjectURL(blob);
    urls.push(url);
    const image = blob.type.startsWith("image/");
    const media = element(image ? "img" : "video", image ? { alt: name } : { muted: true, playsInline: true, preload: "auto" });
    const ready = new Promise((resolve) => { media[image ? "onload" : "oncanplaythrough"] = media.onerror = resolve; });
    media.src = url;
    await ready;
    media.style.setProperty("--ratio", (media.videoWidth || media.naturalWidth || 16) / (media.videoHeight || media.naturalHeight || 9));
    const words = [element("b", { textContent: name })];
    if (prompt) words.push(element("p", { textContent: prompt }));
    if (detail) words.push(element("span", { className: "hint", textContent: detail }));
    return element("figure", { className: "tile", dataset: { testid: "compare-tile" } }, media, element("figcaption", {}, ...words));
  };
  const origins = new Set(videos.map((video) => video.request?.input_reference?.input_of).filter(Boolean));
  const details = differences(videos);
  const figures = await Promise.all([
    ...[...origins].slice(0, 1).map((id) => tile(pathOf(id, "/content?variant=input"), origins.size > 1 ? "Input of the first" : "Input", "", "")),
    ...videos.map((video, index) => tile(pathOf(video.id, "/content"), `${index + 1} · ${video.model}`, video.prompt, details[index])),
  ]);
  tiles.replaceChildren(...figures);
  const media = [...tiles.querySelectorAll("video")].filter((video) => video.duration > 0);
  chosen.forEach(({ card }) => hook("video", card).pause());
  dialog.showModal();
  const longest = videos.reduce((first, next) => (next.num_frames / frameRate(next) > first.num_frames / frameRate(first) ? next : first));
  const fps = frameRate(longest), frames = Math.max(1, Math.round(Math.max(...media.map((video) => video.duration), 0) * fps));
  let together = null;
  const report = () => {
    const frame = frameAt(together.leader.currentTime, fps, frames);
    setRange(scrub, frame, frames - 1);
    setText(label, `${frame + 1} / ${frames}`);
  };
  const show = () => setIcon(button, together?.playing ? "pause" : "play", together?.playing ? "Pause" : "Play");
  const toggle = () => {
    if (together?.playing) together.stop();
    else together?.play(together.leader.ended ? 0 : undefined);
    show();
  };
  if (media.length) together = new Together(media, fps, frames, report);
  setRange(scrub, 0, frames - 1);
  scrub.oninput = () => {
    setRange(scrub, Number(scrub.value), frames - 1);
    together?.stop();
    together?.seek(timeOf(Number(scrub.value), fps));
    setText(label, `${Number(scrub.value) + 1} / ${frames}`);
    show();
  };
  button.onclick = toggle;
  dialog.onkeydown = (event) => {
    if (event.key !== " " || event.target.closest("button")) return;
    event.preventDefault();
    toggle();
  };
  dialog.onclose = () => {
    together?.stop();
    tiles.replaceChildren();
    urls.forEach((url) => URL.revokeObjectURL(url));
    chosen.forEach((run) => loadMedia(run));
  };
  if (together && !still.matches) toggle();
  else if (together) report();
  scrub.focus();
}

// Events

function showConnection(state, words) {
  hook("connection").dataset.state = state;
  setText(hook("connection-words"), words);
}

async function* messages(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "", name = "", data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const lines = buffer.split(/\r\n|\n|\r(?!$)/);
    buffer = lines.pop();
    yield { name: "comment" }; // a sign of life
    for (const line of lines) {
      if (line.startsWith("event:")) name = line.slice(6).trim();
      else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      else if (line === "") {
        if (data.length) yield { name: name || "message", data: data.join("\n") };
        [name, data] = ["", []];
      }
    }
  }
}

async function handle(name, data) {
  if (name === "shutdown") return showConnection("lost", "The server is stopping");
  const run = runs.get(data.id);
  if (!run && hasMore && data.id < [...runs.keys()].sort()[0]) return; // of a page that is not loaded
  if (ENDED.has(name)) {
    put(data.object ? data : await read(pathOf(data.id)));
    if ([...runs.values()].some(({ video }) => video.status === "queued")) resyncSoon();
  } else if (!run) {
    if (name === "status") put(await read(pathOf(data.id)));
    else resyncSoon();
  } else if (name === "status" || name === "progress") {
    put({ ...run.video, ...(name === "progress" ? { status: "in_progress", queue_position: null } : {}), ...data });
  } else if (name === "preview" && /^[\w+/=-]+$/.test(data.jpeg_base64)) {
    run.preview = `data:image/jpeg;base64,${data.jpeg_base64}`;
    render(run);
  }
}

let wake = () => {}; // ends a wait before its time
let stream = null;

const waitFor = (milliseconds) => new Promise((resolve) => {
  wake = resolve;
  setTimeout(resolve, milliseconds);
});

async function follow() {
  let delay = 500, again = false;
  for (;;) {
    // a hidden tab gives its connection back: browsers have six for a server
    while (document.hidden) await waitFor(60_000);
    stream = new AbortController();
    const { signal } = stream;
    let watchdog = 0;
    const alive = () => {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => stream.abort(), 40_000);
    };
    try {
      alive();
      const response = await call("v1/events", { signal, headers: { Accept: "text/event-stream" } });
      await resync();
      showConnection("live", "Live");
      showTrouble("");
      if (again) loadWorlds(); // it may be another server now
      delay = 500;
      for await (const { name, data } of messages(response.body)) {
        alive();
        if (data !== undefined) await handle(name, JSON.parse(data)).catch(() => resyncSoon());
      }
      showConnection("lost", "Reconnecting");
    } catch (error) {
      showConnection("lost", "Reconnecting");
      if (signal.aborted && !document.hidden) setLost(true);
      // without a stream the list is read again and again
      if (error.code !== "unreachable" && !signal.aborted) await resync().catch(() => {});
      if (!lost && error.message && !signal.aborted && !listed) showTrouble(error.message);
    }
    again = true;
    clearTimeout(watchdog);
    stream.abort();
    await waitFor(delay * (0.75 + Math.random() / 2));
    delay = Math.min(10_000, delay * 2);
  }
}

let hiding = 0;
document.addEventListener("visibilitychange", () => {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(() => stream?.abort(), 30_000);
  else wake();
});
window.addEventListener("online", () => wake());

// Start

hook("form").addEventListener("submit", generate);
hook("form").addEventListener("input", (event) => {
  const place = event.target.closest(".field")?.dataset.name;
  if (place && place !== "input_reference") clearProblem(place);
});
hook("world").addEventListener("change", () => pickWorld(hook("world").value));
hook("file").addEventListener("change", (event) => useFile(event.target.files[0]));
hook("input-clear").addEventListener("click", () => {
  setSource(null);
  hook("file").focus();
});
hook("prompt").addEventListener("input", saveDraft);
hook("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) hook("form").requestSubmit();
});
hook("prompt").value = sessionStorage.getItem("prompt") ?? "";
hook("seed").value = randomSeed();
hook("seed").addEventListener("input", () => { hook("keep").checked = hook("seed").value !== ""; });
hook("dice").addEventListener("click", () => {
  hook("seed").value = randomSeed();
  clearProblem("seed");
});
hook("example").addEventListener("click", useExample);
hook("example-small").addEventListener("click", useExample);
hook("older").addEventListener("click", showOlder);
hook("clear-cancelled").addEventListener("click", () => clearCancelled().catch((error) => showTrouble(error.message)));
hook("compare-open").addEventListener("click", () => compare().catch((error) => showTrouble(error.message)));
hook("compare-clear").addEventListener("click", clearPicks);
hook("forget-key").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});
for (const [button, dialog] of [["compare-close", "compare"], ["report-close", "report-dialog"], ["remix-close", "remix-dialog"]]) {
  hook(button).addEventListener("click", () => hook(dialog).close());
}
hook("key-dialog").addEventListener("cancel", (event) => event.preventDefault());
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dragging", type === "dragover");
    if (type === "drop") useFile(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file && !event.clipboardData.types.includes("text/plain")) useFile(file);
});
document.addEventListener("pointerdown", (event) => {
  for (const menu of document.querySelectorAll(".menu[open]")) if (!menu.contains(event.target)) menu.open = false;
});
document.addEventListener("keydown", (event) => {
  const menu = event.key === "Escape" && document.querySelector(".menu[open]");
  if (!menu) return;
  menu.open = false;
  menu.querySelector("summary").focus();
});

showConnection("connecting", "Connecting");
hook("no-script").remove();
loadWorlds();
follow();
