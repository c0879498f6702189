-- The table conf.d/32-sink-postgresql.toml writes; the key makes a message that comes twice one row.
create table readings (
    msgid uuid primary key,
    time timestamptz not null,
    device text not null,
    topic text not null,
    value double precision,
    unit text
);
