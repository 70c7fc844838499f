-- Base models and adapters whose objects are on their way into the object store. A row is there before
-- the first object, and goes when what it was for is registered; what its importer leaves behind when it
-- is lost is found by it.

CREATE TABLE imports (
    -- Of the base model or adapter to be.
    id text PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('base_model', 'adapter')),
    -- An importer that lives says so every minute.
    seen_at timestamptz NOT NULL DEFAULT now(),
    -- When its objects were found to be nobody's: nothing can be registered of them any more.
    given_up_at timestamptz
);
