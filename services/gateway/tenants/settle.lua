-- Note what has become of admitted requests, and charge the tokens that were not known before.
-- KEYS: (hash of a tenant, its open requests)..., hash of requests that are charged without a client
-- ARGV: for each tenant JSON of {begun, ended: ids; tokens: to charge or to give back; limit: tokens a minute, or none;
-- prompt, generated: tokens, for the usage; media: bytes to give back, or none; media_limit: bytes a minute, or none;
-- left: id -> tokens of the answer so far, of requests that go on without a client, or none; name: the tenant's}
-- requires: tenant_hash
local left = KEYS[#KEYS]
ensure_hash(left)

-- Return what others have charged for a request of ours, since the gateway seemed dead to them.
local function charged_by_others(field)
  return tonumber(string.match(redis.call('HGET', left, field) or '', '^(%d+):%d+$') or 0)
end

for i, text in ipairs(ARGV) do
  local key, open, said = KEYS[2 * i - 1], KEYS[2 * i], cjson.decode(text)
  ensure_hash(key)
  ensure_hash(open)
  for _, id in ipairs(said.begun) do begin(key, open, id) end
  local paid = 0
  for _, id in ipairs(said.ended) do
    local field = said.name .. ' ' .. id
    paid = paid + charged_by_others(field)
    redis.call('HDEL', left, field)
    forget(key, open, id)
  end
  for id, generated in pairs(said.left or {}) do
    local field = said.name .. ' ' .. id
    paid = paid + charged_by_others(field)
    redis.call('HSET', left, field, string.format('%d:%d', generated, said.limit or 0))
  end
  said.tokens, said.generated = said.tokens - paid, said.generated - paid
  if said.limit and said.tokens ~= 0 then raise_level(key, 'tokens', said.limit, said.tokens) end
  if said.media then
    if said.media_limit then raise_level(key, 'media', said.media_limit, -said.media) end
    redis.call('HINCRBY', key, 'used:media', -said.media)
  end
  if said.prompt > 0 then redis.call('HINCRBY', key, 'used:prompt', said.prompt) end
  if said.generated ~= 0 then redis.call('HINCRBY', key, 'used:generated', said.generated) end
end
redis.call('EXPIRE', left, KEPT_S)
