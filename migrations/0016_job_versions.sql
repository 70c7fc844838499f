-- What tells whether a job has changed since it was last read, whoever changed it: after every change
-- its row has another version. It is random and no count, so that a version never comes again, not even
-- when the database goes back to an earlier state, as a standby may that takes over.

ALTER TABLE jobs ADD COLUMN version uuid NOT NULL DEFAULT gen_random_uuid();

CREATE FUNCTION change_version() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.version := gen_random_uuid();
    RETURN NEW;
END $$;

CREATE TRIGGER job_changed BEFORE UPDATE ON jobs
    FOR EACH ROW EXECUTE FUNCTION change_version();
