-- Trim a tokens stream below an entry.
-- KEYS: shards, tokens
-- ARGV: fence, ~ or =, entry id
-- requires: fence
redis.call('XTRIM', KEYS[2], 'MINID', ARGV[at], ARGV[at + 1])
