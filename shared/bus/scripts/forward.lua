-- Replace an entry of `encode` by one of `generate`, unless the request is cancelled or was forwarded with
-- another prompt. If that is there already (forward_ahead), only end the entry of `encode`.
-- KEYS: stream, record, generate
-- ARGV: consumer group, consumer, entry id, v, m of the Generate, the Encode, fingerprint of the prompt, id
-- of the request, k
-- Returns 'done', 'lost', 'unwanted' or 'changed'.
-- requires: entries
-- requires: typed
-- requires: add_entry
-- requires: note_entry
if not owns(ARGV[3]) then return 'lost' end
if not is_a('hash', KEYS[2]) then return 'unwanted' end
local request, cancelled, made, ahead =
  unpack(redis.call('HMGET', KEYS[2], 'request', 'cancelled', 'made', 'ahead'))
if not request or cancelled then return 'unwanted' end
if made and made ~= ARGV[7] then return 'changed' end
ack(ARGV[3])
if ahead == ARGV[3] then return 'done' end
local entry = add_entry(KEYS[3], ARGV[4], ARGV[5], ARGV[8], ARGV[9])
redis.call('HSET', KEYS[2], 'encode', ARGV[6], 'made', ARGV[7])
note_entry(KEYS[2], KEYS[3], entry)
return 'done'
