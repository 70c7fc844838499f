/** The page of one job at /jobs/{id}, and the playground at /playground. */

import "./style.css";
import { follow } from "./job";
import { openPlayground } from "./playground";
import { askForKey, showMessage, storedKey, takeKeyFromAddress, watchKeyForm } from "./session";
import { element } from "./view";

function start(): void {
  takeKeyFromAddress();
  watchKeyForm();
  const jobId = decodeURIComponent(location.pathname.match(/^\/jobs\/([^/]+)/)?.[1] ?? "");
  if (jobId === "" && location.pathname !== "/playground") {
    return showMessage("No job named", "The address of a job's page is /jobs/ and the job's id.");
  }
  const key = storedKey();
  if (key === null) return askForKey();
  element("forget-key").hidden = false;
  if (jobId === "") void openPlayground(key);
  else void follow(jobId, key);
}

start();
