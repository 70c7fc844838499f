\set n random(1, 1000000000000000)
BEGIN;
INSERT INTO jobs (id, project_id, api_key_id, model, base_model_id, training_file,
    validation_file, suffix, seed, metadata, hyperparameters, model_name, status, method,
    validate_after)
VALUES ('ftjob-' || :n::text, :project, :api_key, 'bench', :base_model, :file, NULL, NULL, :n,
    jsonb_build_object('number', :n::text), '{"n_epochs": 3, "adapter": {"r": 16}}',
    'ft-bench-tunesmith-' || :n::text, 'validating_files', 'supervised', 'infinity');
INSERT INTO creations (caller, creation, request_sha256, made)
VALUES (:api_key, 'job', sha256(:n::text::bytea), 'ftjob-' || :n::text);
INSERT INTO job_events (id, job_id, level, type, message)
VALUES ('ftevent-a' || :n::text, 'ftjob-' || :n::text, 'info', 'message',
        'Created fine-tuning job: ftjob-' || :n::text),
    ('ftevent-b' || :n::text, 'ftjob-' || :n::text, 'info', 'message',
        'Validating training file: ' || :file::text);
END;
