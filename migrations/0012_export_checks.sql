-- Exports that were compared with the served model and passed, so that each is compared once.

CREATE TABLE export_checks (
    -- A tuned model's name, or a checkpoint's.
    model text NOT NULL,
    -- Format, and how numbers are stored.
    form text NOT NULL,
    -- Of the program that made it: another one may write other bytes.
    version text NOT NULL,
    -- What was compared, the error and its bound, as the manifest has it.
    result jsonb NOT NULL CHECK (jsonb_typeof(result) = 'object'),
    -- Names, sizes and sums of the files that were compared: no others are given out as checked.
    files jsonb NOT NULL CHECK (jsonb_typeof(files) = 'array'),
    PRIMARY KEY (model, form)
);
