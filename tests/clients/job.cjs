// A whole job by OpenAI's SDK for Node: node job.cjs MODEL ROWS prints what it saw as JSON.
// OPENAI_BASE_URL and OPENAI_API_KEY say where and as whom.
const fs = require("node:fs");
// Node 18 has it only there.
globalThis.File ??= require("node:buffer").File;
const { OpenAI } = require("openai");

async function all(page) {
  const entries = [];
  for await (const entry of page) entries.push(entry);
  return entries;
}

async function main(model, rows) {
  const client = new OpenAI();
  const file = await client.files.create({ file: fs.createReadStream(rows), purpose: "fine-tune" });
  const jobs = client.fineTuning.jobs;
  let job = await jobs.create({
    model,
    training_file: file.id,
    suffix: "node",
    method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 2, batch_size: 10 } } },
  });
  while (!["succeeded", "failed", "cancelled"].includes(job.status)) {
    await new Promise((resolve) => setTimeout(resolve, 100));
    job = await jobs.retrieve(job.id);
  }
  const events = await all(jobs.listEvents(job.id, { limit: 2 }));
  const checkpoints = await all(jobs.checkpoints.list(job.id, { limit: 1 }));
  const result = await (await client.files.content(job.result_files[0])).text();
  const tuned = await client.models.retrieve(job.fine_tuned_model);
  const stream = await client.chat.completions.create({
    model: tuned.id,
    messages: [{ role: "user", content: "What is 1 plus 4?" }],
    max_completion_tokens: 8,
    stream: true,
    stream_options: { include_usage: true },
  });
  const answer = {};
  for await (const { choices, usage } of stream) {
    answer.end = choices[0]?.finish_reason ?? answer.end;
    answer.tokens = usage?.completion_tokens;
  }
  const deleted = await client.files.delete(file.id);
  console.log(JSON.stringify({ file, job, events, checkpoints, result, tuned, answer, deleted }));
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error);
  process.exit(1);
});
