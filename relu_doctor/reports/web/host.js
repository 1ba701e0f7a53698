// The TensorBoard around us, where there is one: whether it is dark, and what its address asks for.

const SITE = "p.relu_doctor.site";

/** The window that has us in a frame; null where there is none, or one of another origin. */
export function host() {
  try {
    return parent !== window && parent.document ? parent : null;
  } catch {
    return null;
  }
}

/** Calls back with true for dark, now and whenever it changes: as TensorBoard is, elsewhere as the system prefers. */
export function watchTheme(changed) {
  const media = matchMedia("(prefers-color-scheme: dark)");
  const body = host()?.document.body;
  const read = () => {
    const dark = body ? body.classList.contains("dark-mode") : media.matches;
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    changed(dark);
  };
  if (body) new MutationObserver(read).observe(body, { attributes: true, attributeFilter: ["class"] });
  else media.addEventListener("change", read);
  read();
}

/** The `site_id` that TensorBoard's address asks for; empty where it asks for none. */
export function askedSite() {
  return new URLSearchParams(host()?.location.hash.slice(1) ?? "").get(SITE) ?? "";
}

/** Calls back when that may have changed. */
export function watchAsked(changed) {
  host()?.addEventListener("hashchange", changed);
}
