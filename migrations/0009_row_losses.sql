-- What each training row showed when it was last trained on.

CREATE TABLE job_row_losses (
    job_id text NOT NULL REFERENCES jobs,
    row_number bigint NOT NULL CHECK (row_number >= 0),
    line bigint NOT NULL CHECK (line > 0),
    step bigint NOT NULL CHECK (step > 0),
    loss double precision NOT NULL,
    PRIMARY KEY (job_id, row_number)
);
CREATE INDEX row_losses_of_a_job ON job_row_losses (job_id, loss DESC, row_number);
