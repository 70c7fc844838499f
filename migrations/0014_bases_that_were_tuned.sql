-- Models that were tuned in full and that adapters go on: each is a base model of its own, which no
-- list shows and no name finds.

-- Where its files lie, where these are the weights of a tuned model, and the imported model that it
-- was tuned from, over however many jobs.
ALTER TABLE base_models
    ADD COLUMN weights jsonb UNIQUE,
    ADD COLUMN origin_id text REFERENCES base_models,
    ADD CONSTRAINT tuned_means_origin CHECK ((weights IS NULL) = (origin_id IS NULL));
CREATE INDEX jobs_by_base_model ON jobs (base_model_id);

-- Weights whose model was deleted while something stood on them: they go with the last that does.
CREATE TABLE weights_to_delete (
    place jsonb PRIMARY KEY,
    created_at timestamptz NOT NULL DEFAULT now()
);
