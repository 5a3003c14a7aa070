// What the servers share: the pool, the token check, and the one insert.
import { timingSafeEqual } from "node:crypto";
import pg from "pg";

const token = Buffer.from(process.env.BENCH_TOKEN);
export const pool = new pg.Pool({
  host: process.env.BENCH_PGHOST,
  port: Number(process.env.BENCH_PGPORT),
  user: process.env.BENCH_PGUSER,
  database: process.env.BENCH_PGDATABASE,
  max: 16,
});

export const BODY_LIMIT = 48 * 1024 * 1024;

export function allowed(presented) {
  const bytes = Buffer.from(presented ?? "");
  return bytes.length === token.length && timingSafeEqual(bytes, token);
}

// `text` is kept as it came; what was parsed of it fills the columns that people search by.
export async function keep(text) {
  const { Meta: meta } = JSON.parse(text);
  await pool.query({
    name: "keep",
    text: "INSERT INTO inbox (log_id, kind, body) VALUES ($1, $2, $3)",
    values: [meta.Logs[0].ID, `${meta.DataModel}.${meta.EventType}`, text],
  });
}
