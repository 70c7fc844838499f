/** What all pages share: the API key of this browser, and which face of the page is seen. */

import { ApiFailure } from "./api";
import { element } from "./view";

const KEY_NAME = "tunesmith.api-key";
const FACES = ["key-form", "message", "job", "playground"] as const;

/** `#key=…` is taken over and leaves the address at once, so that it is not shared by accident. */
export function takeKeyFromAddress(): void {
  const key = new URLSearchParams(location.hash.slice(1)).get("key");
  if (key !== null && key !== "") {
    localStorage.setItem(KEY_NAME, key);
    history.replaceState(null, "", location.pathname + location.search);
  }
}

export function storedKey(): string | null {
  return localStorage.getItem(KEY_NAME);
}

/** Shows one face of the page and hides the others. */
export function show(face: (typeof FACES)[number]): void {
  for (const id of FACES) element(id).hidden = id !== face;
}

export function showMessage(title: string, text: string): void {
  element("message-title").textContent = title;
  element("message-text").textContent = text;
  document.title = `${title} · tunesmith`;
  show("message");
}

export function askForKey(reason?: string): void {
  if (reason !== undefined) element("key-reason").textContent = reason;
  show("key-form");
  element("forget-key").hidden = true;
  element<HTMLInputElement>("key-input").focus();
}

/** Whether the server refused the key: then it is forgotten and asked for anew. */
export function isRefusedKey(error: unknown): boolean {
  if (!(error instanceof ApiFailure) || error.httpStatus !== 401) return false;
  localStorage.removeItem(KEY_NAME);
  askForKey(`The server refused the key: ${error.message}`);
  return true;
}

/** Makes the form and the button of the key work. */
export function watchKeyForm(): void {
  element<HTMLFormElement>("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    localStorage.setItem(KEY_NAME, element<HTMLInputElement>("key-input").value.trim());
    location.reload();
  });
  element("forget-key").addEventListener("click", () => {
    localStorage.removeItem(KEY_NAME);
    location.reload();
  });
}
