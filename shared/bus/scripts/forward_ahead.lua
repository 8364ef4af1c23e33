-- Append the entry of `generate` of a request while its embeddings are being made, and keep its entry of `encode`, which
-- stays the promise that they will be. Not for a request that was sent back before: no prompt comes back twice for
-- embeddings that are only late, not to an engine that does not wait for them either.
-- KEYS: stream, record, generate
-- ARGV: consumer group, consumer, entry id, v, m of the Generate, the Encode, fingerprint of the prompt, id
-- of the request, k
-- Returns 'done', 'later', 'lost', 'unwanted' or 'changed'.
-- requires: entries
-- requires: typed
-- requires: add_entry
-- requires: note_entry
if not owns(ARGV[3]) then return 'lost' end
if not is_a('hash', KEYS[2]) then return 'unwanted' end
local request, cancelled, made, ahead, returned =
  unpack(redis.call('HMGET', KEYS[2], 'request', 'cancelled', 'made', 'ahead', 'returned'))
if not request or cancelled then return 'unwanted' end
if made and made ~= ARGV[7] then return 'changed' end
if ahead == ARGV[3] then return 'done' end
if ahead or returned then return 'later' end
local entry = add_entry(KEYS[3], ARGV[4], ARGV[5], ARGV[8], ARGV[9])
redis.call('HSET', KEYS[2], 'encode', ARGV[6], 'made', ARGV[7], 'ahead', ARGV[3])
note_entry(KEYS[2], KEYS[3], entry)
return 'done'
